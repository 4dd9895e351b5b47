"""Every layer's rows by TransformerLens 4: MODEL PROMPTS OUT. Its defaults: BOS before each prompt, where the tokenizer has one."""

import torch
from prompts import arguments, batches, save
from transformer_lens.model_bridge import TransformerBridge


def main() -> None:
    options = arguments()
    model = TransformerBridge.boot_transformers(str(options.model), device="cpu", dtype=getattr(torch, options.dtype))
    last = model.cfg.n_layers - 1
    for chosen, texts in batches(options, lambda text: model.to_tokens(text).shape[1]):
        token_ids_BT = model.to_tokens(texts)
        counts = torch.tensor([model.to_tokens(text).shape[1] for text in texts])
        places_T = torch.arange(token_ids_BT.shape[1])
        is_left = model.tokenizer.padding_side == "left"
        real_BT = places_T >= (len(places_T) - counts)[:, None] if is_left else places_T < counts[:, None]
        with torch.inference_mode():
            _, cache = model.run_with_cache(texts, names_filter=lambda name: name.endswith("hook_resid_post"))
        save(options, chosen, [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(last + 1)], token_ids_BT, real_BT)


if __name__ == "__main__":
    main()
