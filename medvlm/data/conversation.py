"""Conversation -> token ids and labels, through the tokenizer's own chat template.

Which tokens are supervised is known by construction. The template is rendered once per pattern of roles with private-
use placeholders in place of the contents; the rendered text is thus a list of literal pieces and slots, so the
character span of every assistant turn is exact, and the tokenizer's offsets map spans to tokens. No text is ever
searched again.
"""

import re
from functools import lru_cache
from typing import Any

from medvlm.data.schema import IMAGE_MARK, Message
from medvlm.errors import UserError

IGNORE = -100
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Language models' templates want string contents; Hugging Face's multimodal messages are lists of parts. This prelude
# flattens the parts, an image as "<image>" and a line break, and then hands over to the language model's template.
MULTIMODAL_PRELUDE = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.value = text.value + '<image>\n' -%}"
    "{%- else -%}{%- set text.value = text.value + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.value | trim}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)

ONE_DAY = (
    "{%- macro strftime_now(form) -%}"
    "{{ {'%Y-%m-%d': '2025-01-01', '%d %B %Y': '01 January 2025'}.get(form, '01 Jan 2025') }}"
    "{%- endmacro -%}"
)


def multimodal_template(template: str | None) -> str:
    """The chat template of the exported processor: accepts string contents and lists of parts."""
    if template and IMAGE_MARK in template:
        return template  # already multimodal
    return MULTIMODAL_PRELUDE + (template or DEFAULT_TEMPLATE)


def plain_template(tokenizer: Any) -> str | None:
    """A tokenizer's chat template; of several the default one. Raises UserError where none of them is."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(f"{tokenizer.name_or_path}: has chat templates {', '.join(template)}, and no default one")
        return template["default"]
    return template


def asked_as_trained(tokenizer: Any, template: str) -> str:
    """The template, if what stands before an answer that is trained is what a question is asked with later.

    Qwen3's puts an empty block of thoughts before the last answer and asks without it, unless ``enable_thinking`` is
    false, which is then written into the template. Raises UserError for one that differs in another way.
    """

    def before_answers(chosen: str) -> tuple[str, str]:
        user, answer = ({"role": role, "content": mark} for role, mark in (("user", "\ue000"), ("assistant", "\ue001")))
        try:
            trained = rendered(tokenizer, chosen, [user, answer])
            asked = rendered(tokenizer, chosen, [user], add_generation_prompt=True)
        except Exception as error:  # jinja templates raise whatever they like
            raise UserError(f"the chat template refuses a question and an answer: {error}") from error
        return trained.partition("\ue001")[0].rstrip(), asked.rstrip()

    for chosen in (template, "{%- set enable_thinking = false -%}" + template):
        trained, asked = before_answers(chosen)
        if trained == asked:
            return chosen
    raise UserError(
        f"{tokenizer.name_or_path}: its chat template puts {trained[-40:]!r} before an answer, and {asked[-40:]!r} "
        "where one is asked for: the model would be asked otherwise than it was trained; give another"
    )


def rendered(tokenizer: Any, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of messages. Some templates print the day's date, by which a text would depend on when it is read: here
    it is always the same."""
    return tokenizer.apply_chat_template(messages, chat_template=ONE_DAY + template, tokenize=False, **options)


class ConversationEncoder:
    """Turns messages into ``input_ids`` and ``labels`` (lists of the same length T, -100 where not supervised).

    Supervised are each assistant turn's text and the special token that ends it. ``image_tokens`` copies of the
    ``<image>`` token stand for each image. Raises UserError for a template that gives a turn no end.
    """

    def __init__(self, tokenizer: Any, chat_template: str, image_tokens: int):
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: medvlm needs a fast tokenizer (one with character offsets)")
        self.tokenizer, self.template, self.image_tokens = tokenizer, chat_template, image_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        self._pieces = lru_cache(maxsize=256)(self._render)

    def _render(self, pattern: tuple[tuple[str, ...], ...]) -> list[str]:
        """The literal strings around the text parts that the template prints for (role, part type, ...) turns."""
        messages, slots = [], 0
        for role, *types in pattern:
            parts: list[dict[str, str]] = []
            for kind in types:
                parts.append({"type": kind} if kind == "image" else {"type": kind, "text": f"\ue000{slots}\ue001"})
                slots += kind == "text"
            messages.append({"role": role, "content": parts})
        try:
            text = rendered(self.tokenizer, self.template, messages)
        except Exception as error:  # jinja templates raise whatever they like
            raise UserError(f"the chat template refuses these turns: {error}") from error
        pieces = re.split("\ue000(\\d+)\ue001", text)
        if [int(p) for p in pieces[1::2]] != list(range(slots)):
            raise UserError("the chat template does not print each turn once, in order")
        return pieces[::2]

    def __call__(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        pattern = tuple((m.role, *(p.type for p in m.content)) for m in messages)
        first, *rest = self._pieces(pattern)
        text, spans = first, []
        parts = [(m.role, p.text.strip()) for m in messages for p in m.content if p.type == "text"]
        for (role, content), literal in zip(parts, rest, strict=True):
            if role == "assistant":
                spans.append((len(text), len(text) + len(content)))
            text += content + literal
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [IGNORE] * len(ids)
        position = 0
        for start, end in spans:
            while position < len(ids) and offsets[position][1] <= start:
                position += 1
            while position < len(ids) and offsets[position][0] < end:
                labels[position] = ids[position]
                position += 1
            # the end-of-turn token, past white space that some templates put before it
            stop = position
            while stop < len(ids) and ids[stop] not in self.special and not text[slice(*offsets[stop])].strip():
                stop += 1
            if stop == len(ids) or ids[stop] not in self.special:
                raise UserError("the chat template ends an assistant turn without a special token: add eos_token to it")
            labels[position : stop + 1] = ids[position : stop + 1]
            position = stop + 1
        return self._expand(ids, labels)

    def _expand(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        if self.image_id not in ids:
            return ids, labels
        out_ids: list[int] = []
        out_labels: list[int] = []
        start = 0
        for at in (n for n, token in enumerate(ids) if token == self.image_id):
            out_ids += ids[start:at] + [self.image_id] * self.image_tokens
            out_labels += labels[start:at] + [labels[at]] * self.image_tokens
            start = at + 1
        return out_ids + ids[start:], out_labels + labels[start:]
