"""Two workers on two cores: one intra-op thread each."""

import torch

torch.set_num_threads(1)
