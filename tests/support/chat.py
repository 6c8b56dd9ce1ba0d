"""Tiny tokenizers with chat templates of the kinds that are in use: what the tests of instruction data run on."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As SmolLM2: a system turn of its own where the conversation has none.
CHATML_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
# As the older ones: no prompt to generate from.
CHATML_NO_PROMPT = CHATML.partition("{% if add")[0]
# As Mistral and Llama 2: no header of the answer; the system text moves into the last question.
INST = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.index0 >= turns | length - 2 else '') }}"
    "{{ message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The same with a header: the text before the first answer is not the prompt that one would be generated from.
MOVED = (
    "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% for message in turns %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ (system if message['role'] == 'user' and loop.index0 >= turns | length - 2 else '') }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma: roles of other names, text trimmed, no system turn.
TRIMMED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Qwen3: the last answer gets an empty thought, thoughts of earlier ones are taken out.
THINKING = (
    "{% for message in messages %}{% set text = message['content'] %}{% if message['role'] == 'assistant' %}"
    "{% set said = text.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in text else '' %}"
    "{% set text = '<think>\n' + thought + '\n</think>\n\n' + said %}{% else %}{% set text = said %}{% endif %}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Vicuna, but with nothing at all after an answer: the end of text has to be appended.
OPEN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# The same with a blank line between turns, and a space.
PARAGRAPHS = OPEN.replace("{{ message['role']", "{{ ('' if loop.first else '\n ') + message['role']")
# Marks what is generated, by which transformers makes a mask of its own.
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REVERSING = "{% for message in messages %}{{ message['content'] | reverse }}{% endfor %}"
COUNTING = "{% for message in messages %}{{ message['content'] ~ message['content'] | length }}{% endfor %}"

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
# Some letters of more than one byte, and pairs that merge across words' edges.
_MERGES = [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ã", "©"), (":", "Ċ"), ("Ġ", "ab")]


def byte_tokenizer(template: str | None, trim_offsets: bool = True, **settings) -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's: bytes, merged; every text can be decoded to itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *("".join(pair) for pair in _MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _finished(tokenizer, template, settings)


def space_tokenizer(template: str | None, **settings) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are ▁, one goes before the text, and <s> before that where special tokens are asked for."""
    letters = [chr(code) for code in range(32, 127)]
    pieces = ["<unk>", "▁", "\n", "é", "中", *letters[1:], "▁a", "▁b", "ab", "▁ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", start)])
    return _finished(tokenizer, template, settings)


def _finished(tokenizer: Tokenizer, template: str | None, settings: dict) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)
