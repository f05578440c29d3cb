"""Train a language model in transformers' Trainer with LISA: two of its layers at a time.

Checkpoints hold only the trained tensors.

python examples/hf_trainer.py
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import vismt
from vismt.integrations.hf import VismtCallback

TEXTS = ["the sky is blue", "the grass is green", "the film was good", "the plot was dull"] * 8


def main(out: str | Path = "runs/hf_trainer", name: str = "HuggingFaceTB/SmolLM2-135M", steps: int = 40) -> Trainer:
    """Train for `steps` steps.

    A later call with the same folder and more steps continues from the last checkpoint.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    print(vismt.adapt(model, "lisa", active=2, interval=5))

    ids = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in TEXTS]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out), max_steps=steps, per_device_train_batch_size=1, save_steps=2, report_to=[], use_cpu=True
        ),
        train_dataset=[{"input_ids": tokens, "labels": tokens} for tokens in ids],
        callbacks=[VismtCallback()],  # drives the layers
    )
    trainer.train(resume_from_checkpoint=any(Path(out).glob("checkpoint-*")))
    return trainer


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the hub did not answer, and the cache lacks the weights
        sys.exit(f"error: {str(error).splitlines()[0]}")
