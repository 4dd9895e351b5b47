"""Every layer's rows by nnsight: MODEL PROMPTS OUT. Its defaults: prompts are padded on the left."""

import torch
from nnsight import LanguageModel
from prompts import arguments, batches, save


def main() -> None:
    options = arguments()
    model = LanguageModel(str(options.model), device_map="cpu", dtype=getattr(torch, options.dtype), dispatch=True)
    for chosen, texts in batches(options, lambda text: len(model.tokenizer(text)["input_ids"])):
        with torch.inference_mode(), model.trace(texts):
            saved = [layer.output for layer in model.model.layers].save()
        rows = [output[0] if isinstance(output, tuple) else output for output in saved]
        encoded = model.tokenizer(texts, padding=True, return_tensors="pt")
        save(options, chosen, rows, encoded["input_ids"], encoded["attention_mask"])


if __name__ == "__main__":
    main()
