"""Export an adapter as a plain LoRA, and serve it with peft and transformers, without vismt.

python examples/serve_with_peft.py
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import vismt


def export(out: Path, name: str, steps: int) -> Path:
    """Train a PiSSA for a few steps, and return the folder of its export."""
    model = AutoModelForCausalLM.from_pretrained(name)
    vismt.adapt(model, "pissa", targets=["q_proj", "v_proj"], rank=8)
    ids = AutoTokenizer.from_pretrained(name)("the sky is blue", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return vismt.export_peft(model, out)


def main(out: str | Path = "runs/serve_with_peft", name: str = "HuggingFaceTB/SmolLM2-135M", steps: int = 20) -> str:
    """Return what the served model says."""
    folder = export(Path(out), name, steps)
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    words = tokenizer("the sky", return_tensors="pt")["input_ids"]
    return tokenizer.decode(served.generate(input_ids=words, max_new_tokens=4, do_sample=False)[0])


if __name__ == "__main__":
    try:
        print(main())
    except OSError as error:  # the hub did not answer, and the cache lacks the weights
        sys.exit(f"error: {str(error).splitlines()[0]}")
