"""The hyper-parameters that MLLM algorithms are put together from: default, sampler for random search, source.

Where the paper (arXiv 2602.23777) gives a value it is the default; where it is silent the source says what was chosen.
"""

from __future__ import annotations

from typing import Any

from domainbed_reasoning.registry import Hparam

RESUME_HPARAMS = {
    "resume": Hparam(True, None, "started again, a killed job goes on; its state is in the user's cache folder"),
}

MODEL_HPARAMS = {
    **RESUME_HPARAMS,
    "model": Hparam("OpenGVLab/InternVL3-8B-hf", None, "the paper's backbone", embedded="tiny"),
    "dtype": Hparam("auto", None, "bfloat16 on CUDA as checkpoints were trained, float32 on CPU; float16 only answers"),
    "quantize": Hparam("none", None, "the paper's; nf4 or int8 (bitsandbytes) for smaller GPUs"),
    "max_tiles": Hparam(1, None, "not published; one tile costs 256 tokens an image, 4 are 2 x 2 and the whole: 1280"),
    "data_augmentation": Hparam(False, None, "chains name colours, sides and views, which DomainBed's would change"),
    "answer": Hparam("chain", None, "the paper reads answers from the chain's conclusion"),
    "answer_matching": Hparam(
        "tolerant", None, "not published; conclusions are compared after normalization; or exact"
    ),
    "both_answers": Hparam(True, None, "the other answer is recorded too, at the last evaluation"),
    "votes": Hparam(1, None, "the paper's one chain; more: the majority of so many sampled chains (arXiv 2203.11171)"),
    "vote_temperature": Hparam(0.7, None, "of the chains that vote; as in arXiv 2203.11171"),
    "max_new_tokens": Hparam(512, None, "twice the paper's chains (about 250 tokens)", embedded=112),
    "eval_batch": Hparam(64, None, "images answered at a time: 8B holds 4 GiB of keys and values for 64"),
    "first_evaluation": Hparam(0, None, "DomainBed evaluates after step 1 too; before this one scores are all alike"),
    # DomainBed's batch size is per domain: 43 x 3 source domains = 129, the paper's 128.
    "batch_size": Hparam(43, lambda r: int(2 ** r.uniform(3, 5.5)), "paper: 128 over three sources", embedded=6),
}

TRAINING_HPARAMS = {
    "lr": Hparam(5e-4, lambda r: 10 ** r.uniform(-4.5, -3), "paper: 5e-4", embedded=4e-3),
    "weight_decay": Hparam(0.01, lambda r: r.choice([0.0, 0.01, 0.1]), "not published; AdamW's default in PyTorch"),
    "lr_schedule": Hparam("cosine", None, "not published; InternVL's own fine-tuning: constant, linear or cosine"),
    "warmup": Hparam(0.03, None, "share of a stage's steps; not published; InternVL's own fine-tuning"),
    "grad_clip": Hparam(0.0, None, "off: a clip lets the label's larger gradient take most of the step"),
    "lora_rank": Hparam(8, lambda r: int(r.choice([4, 8, 16])), "paper: 8"),
    "lora_alpha": Hparam(16, lambda r: int(r.choice([8, 16, 32])), "not published; twice the rank, as InternVL's own"),
    "lora_dropout": Hparam(0.05, lambda r: r.choice([0.0, 0.05, 0.1]), "not published; InternVL's own", embedded=0.0),
    "lora_targets": Hparam("both", None, "paper: vision encoder and language decoder; or vision, or language"),
    "lora_projector": Hparam(False, None, "the paper names the two towers only"),
    "gradient_checkpointing": Hparam(False, None, "less memory for about a third more time"),
    "micro_batch": Hparam(4, None, "samples a backward pass; the update is the whole batch's", embedded=64),
    "mtct_epochs": Hparam(3, None, "paper: 3 epochs; 6 of the embedded set, whose epochs are 19 steps", embedded=6),
}

LABEL_HPARAMS = {"label_weight": Hparam(1.0, lambda r: r.choice([0.1, 0.3, 1.0]), "paper: 1 (eq. 1)")}
CHAIN_HPARAMS = {"chain_weight": Hparam(1.0, lambda r: r.choice([1.0]), "paper: 1 (eq. 1)")}
BALANCE_HPARAMS = {
    "gradient_balance": Hparam(
        "none", None, "paper: plain sum (eq. 1); norm: the label gradient as long as the chain's"
    ),
}

SARR_HPARAMS = {
    "sarr_rounds": Hparam(3, lambda r: int(r.choice([1, 2, 3])), "paper: N = 3"),
    "sarr_epochs": Hparam(3, None, "paper: 3 epochs each; 2 of the embedded set keep the demo short", embedded=2),
    "temperature": Hparam(0.0, lambda r: r.choice([0.0, 0.7, 1.0]), "of self-labelling; not published; 0 is greedy"),
    "top_p": Hparam(1.0, None, "of self-labelling; not published"),
    "sarr_filter": Hparam("conclusion", None, "paper: conclusion; consistent: the chain has to support it as well"),
    "sarr_votes": Hparam(1, None, "the paper's one chain an image; more: the majority's, at a temperature above 0"),
}

_CHOICES = {
    "answer": ("chain", "label"),
    "answer_matching": ("tolerant", "exact"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantize": ("none", "nf4", "int8"),
    "lora_targets": ("both", "vision", "language"),
    "gradient_balance": ("none", "norm"),
    "sarr_filter": ("conclusion", "consistent"),
    "lr_schedule": ("constant", "linear", "cosine"),
}
_POSITIVE = (
    "max_new_tokens", "eval_batch", "batch_size", "lr", "lora_rank", "micro_batch", "sarr_epochs", "top_p",
    "clip_epochs", "clip_lora_rank", "clip_lora_alpha",
)  # fmt: skip
_NOT_NEGATIVE = (
    "weight_decay", "warmup", "grad_clip", "mtct_epochs", "sarr_rounds", "temperature", "vote_temperature",
    "label_weight", "first_evaluation",
)  # fmt: skip


def check_values(hparams: dict[str, Any]) -> None:
    """Refuse values that no training could use, before the model is loaded.

    Raises:
        ValueError: naming the hyper-parameter and what it may be.
    """
    for name, choices in _CHOICES.items():
        if name in hparams and hparams[name] not in choices:
            raise ValueError(f"hparam {name}: {hparams[name]!r} is none of {', '.join(choices)}.")
    for names, least in ((_POSITIVE, "above 0"), (_NOT_NEGATIVE, "0 or more")):
        for name in names:
            value = hparams.get(name, 1)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or value < 0 or (value == 0 and names is _POSITIVE):
                raise ValueError(f"hparam {name}: {value!r} is not a number {least}.")
    for name, temperature in (("votes", "vote_temperature"), ("sarr_votes", "temperature")):
        votes = hparams.get(name, 1)
        if type(votes) is not int or votes < 1:
            raise ValueError(f"hparam {name}: {votes!r} is not a whole number of 1 or more.")
        if votes > 1 and not hparams[temperature] > 0:
            raise ValueError(f"hparam {name}: {votes} greedy chains are all alike; set {temperature} above 0.")
