"""Take a pruned model to where it shall run: plain transformers, and llama.cpp.

Run, offline, a minute on two CPU cores (``runs/demo/pruned`` is what `demo.py` saves)::

    python recipes/deploy.py --model runs/demo/pruned
    python recipes/deploy.py --model my-pruned-model --output deployed

``transformers/`` holds a model of its own class where its layers allow that, else of a class that
lies beside the weights; ``gguf/`` one file for llama.cpp (pip install 'lit-prune[gguf]').
From each the model is run as its users would run it, where that is installed here.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import load_pruned, save_pruned

PROMPT = "def main():"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="what save_pruned wrote")
    parser.add_argument("--output", type=Path, default=Path("runs/deployed"))
    options = parser.parse_args()
    model, tokenizer = load_pruned(options.model), AutoTokenizer.from_pretrained(options.model)

    folder = save_pruned(
        model, options.output / "transformers", tokenizer=tokenizer, overwrite=True
    )
    # `import lit_prune` has told transformers of pruned classes; without it: trust_remote_code=True
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = tokenizer.decode(loaded.generate(ids, max_new_tokens=16, do_sample=False)[0])
    print(f"transformers ({type(loaded).__name__}): {text!r}")

    if importlib.util.find_spec("gguf") is None:
        print("gguf: pip install 'lit-prune[gguf]'")
        return
    folder = save_pruned(
        model, options.output / "gguf", format="gguf", tokenizer=tokenizer, overwrite=True
    )
    print(f"llama.cpp: llama-cli -m {folder / 'model.gguf'} -p {PROMPT!r}")
    if importlib.util.find_spec("llama_cpp"):
        from llama_cpp import Llama

        llama = Llama(str(folder / "model.gguf"), verbose=False)
        if llama.metadata["tokenizer.ggml.model"] == "none":  # the card says why
            print("llama.cpp: it knows no such tokenizer; the file is run by token ids")
            return
        print(f"llama.cpp: {llama(PROMPT, max_tokens=16, temperature=0)['choices'][0]['text']!r}")


if __name__ == "__main__":
    main()
