"""Makes the folder tokenizer/ beside this file: a byte-level BPE that adds <s> to texts, and a chat template that writes <s> itself.

Run it from anywhere with the project's test environment; the files it writes are committed.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """The river carries what the mountains give it. A small stone can travel for a thousand years and still be called a stone.
When the water is low, children walk across; when it is high, nobody speaks of crossing. The bridge was built later, and nobody
remembers who paid for it. 河水带走山给它的一切。水浅的时候，孩子们走过去；水深的时候，没有人谈过河。"""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role: ' + message.role) }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<s>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(Path(__file__).parent / "tokenizer")


if __name__ == "__main__":
    main()
