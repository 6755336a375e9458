"""What plain transformers computes for an image and a question."""

from __future__ import annotations

from typing import Any


def chat_inputs(processor: Any, picture: Any, question: str, **settings: Any) -> Any:
    """Return the transformers library's own inputs for a question about a picture, up to where the answer begins."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )
