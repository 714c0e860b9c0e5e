"""The fresh process of `verify_saved`: ``python check.py DIRECTORY REFERENCE``.

Run by its path, so that the first half sees what a stranger sees: torch and transformers, without
this package. Only the second half imports it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Largest difference of logits, as a fraction of the largest logit, where bits cannot be equal.
# Another device sums in another order, and a GPU multiplies float32 as TF32 (10 bits).
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}
# On the CPU, where zeros were added: the same numbers in sums of another length.
_PADDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}


class Different(Exception):  # noqa: N818 - what was found, not what went wrong here
    """What was saved is not what was in memory."""


def load_as_stranger(directory: Path, about: dict[str, Any]) -> Any:  # noqa: ANN401 - untyped upstream
    """Load without this package: by the model file of the directory, or by plain transformers."""
    sys.modules["lit_prune"] = None  # type: ignore[assignment] # whoever imports it fails
    try:
        if about["code"] is None:
            auto = getattr(transformers, about["auto"])
            model = auto.from_pretrained(directory, local_files_only=True)
        else:
            # the file was put there by this very save: no flag is needed to import it
            spec = importlib.util.spec_from_file_location(about["code"], directory / about["code"])
            assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - narrows the type
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # transformers asks where a class comes from
            spec.loader.exec_module(module)
            model = getattr(module, about["class"]).from_pretrained(
                directory, local_files_only=True
            )
    finally:
        del sys.modules["lit_prune"]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # aligned as torch aligns its own memory
    model.tie_weights()
    return model


def compare(model: Any, about: dict[str, Any], wanted: Tensor, ids: Tensor, *, exact: bool) -> str:  # noqa: ANN401 - untyped upstream
    """Say how close the logits are.

    Raises:
        Different: If they are not close enough.
    """
    if about["attention"] in ("eager", "sdpa"):
        model.set_attn_implementation(about["attention"])
    with torch.no_grad():
        rows = ids.split(1 if about["one_by_one"] else len(ids))
        got = torch.cat([model.eval()(input_ids=x, use_cache=False).logits for x in rows])
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        raise Different(
            f"logits are {tuple(got.shape)} {got.dtype}, were {tuple(wanted.shape)} {wanted.dtype}."
        )
    if torch.equal(got, wanted):
        return "logits equal bit for bit"
    if torch.equal(got.nan_to_num(), wanted.nan_to_num()):
        return "logits equal bit for bit (not all finite)"
    here = about["on_cpu"] and about["attention"] in ("eager", "sdpa")
    tolerance = _CLOSE[got.dtype] if not here else 0.0 if exact else _PADDED[got.dtype]
    if about["rounded"] and not exact:
        tolerance = _CLOSE[got.dtype]  # its rotary frequencies are other bits
    allowed = tolerance * float(wanted.double().abs().max())
    by_token = (got.double() - wanted.double()).abs().amax(-1)
    # rounding may send a token to another of two equally good experts: half of them have to agree
    worst = float(by_token.median() if about["routed"] else by_token.max())
    if not worst <= allowed:
        raise Different(
            f"logits differ by up to {worst:.3g}, allowed is {allowed:.3g} ({got.dtype})."
        )
    return f"logits close (largest difference {worst:.3g}, allowed {allowed:.3g})"


def check(directory: Path, reference: Path) -> str:
    """Compare a saved directory with the reference; return what was compared, in words.

    Raises:
        Different: If anything differs.
    """
    with safe_open(reference, framework="pt") as file:
        wanted, ids = file.get_tensor("logits"), file.get_tensor("ids")
        about = json.loads(file.metadata()["lit_prune"])
    torch.set_float32_matmul_precision(about["matmul_precision"])
    torch.set_num_threads(1)
    model = load_as_stranger(directory, about)
    way = (
        "without lit_prune, by plain transformers"
        if about["code"] is None
        else ("without lit_prune, by the model file")
    )
    exact = about["verbatim"] and not about["rounded"]
    words = [f"{way}: {compare(model, about, wanted, ids, exact=exact)}"]

    from lit_prune.saving.load import load_pruned
    from lit_prune.saving.verify import ROOT
    from lit_prune.saving.weights import digest_of

    if (root := str(ROOT)) != about["package"]:
        raise Different(f"the fresh process runs lit_prune from {root}, not {about['package']}.")
    if about["one_dtype"] and digest_of(model) != about["digest"]:
        raise Different(f"{way}: other weights, dtypes or ties.")
    del model
    model = load_pruned(directory)
    if digest_of(model) != about["digest"]:
        raise Different("weights, shapes, dtypes or ties differ after loading.")
    exact = about["verbatim"]
    words.append(f"load_pruned: {compare(model, about, wanted, ids, exact=exact)}")
    return "fresh process, weights equal bit for bit; " + "; ".join(words)


def main(arguments: Sequence[str]) -> int:
    """Print what was compared, or on standard error what differs; return the exit status."""
    try:
        sys.stdout.write(check(Path(arguments[0]), Path(arguments[1])) + "\n")
    except (Different, OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(" ".join(f"{error}".split()) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
