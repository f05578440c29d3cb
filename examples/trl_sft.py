"""Supervised fine-tuning with TRL's SFTTrainer.

The callback holds PoLAR's factors near their manifold.

pip install trl datasets && python examples/trl_sft.py
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import vismt
from vismt.integrations.hf import VismtCallback

try:
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset
except ImportError:
    sys.exit("error: trl or datasets is not installed: pip install trl datasets")

TEXTS = ["the sky is blue", "the grass is green", "the film was good", "the plot was dull"] * 8


def main(out: str | Path = "runs/trl_sft", name: str = "HuggingFaceTB/SmolLM2-135M", steps: int = 40) -> Path:
    """Return the folder of the adapter."""
    model = AutoModelForCausalLM.from_pretrained(name)
    vismt.adapt(model, "polar", targets=["q_proj", "v_proj"], rank=4)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(name),
        args=SFTConfig(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=2,
            max_length=64,
            report_to=[],
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        callbacks=[VismtCallback()],
    )
    trainer.train()
    return vismt.save_adapter(trainer.model, Path(out) / "adapter")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the hub did not answer, and the cache lacks the weights
        sys.exit(f"error: {str(error).splitlines()[0]}")
