"""README's picture, docs/first_picture.svg: norms over one prompt's tokens, as `m2ray report` draws them, from a real run of a trained model.

python scripts/readme_picture.py MODEL     where MODEL is SmolLM2-135M-Instruct, as scripts/trained_model makes it
"""

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import m2ray
from m2ray.api.opening import run_tokenizer
from m2ray.report.building import build_page
from m2ray.storage import open_store

OUT = Path(__file__).parents[1] / "docs" / "first_picture.svg"
PROMPT = "The capital of France is Paris, and the capital of Italy is Rome"
FONT = "text { font-family: system-ui, sans-serif !important; }"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="m2ray-picture-") as folder:
        run = m2ray.extract(model=sys.argv[1], prompts=[PROMPT], output=f"{folder}/run")
        page = build_page(open_store(f"{folder}/run"), run, words=run_tokenizer(run.job, None).words)
    (svg,) = re.findall(r'<svg\b[^>]*aria-labelledby="prompt-drawn-title.*?</svg>', page, re.DOTALL)
    # The colours of the page, light and dark: its first three rules.
    colours = "".join(files("m2ray.report").joinpath("page.css").read_text(encoding="utf-8").partition("* {")[0])
    OUT.write_text(re.sub(r"(<svg\b[^>]*>)", rf"\1<style>{colours}{FONT}</style>", svg, count=1) + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
