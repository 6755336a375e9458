"""The hyper-parameters that MLLM algorithms are put together from: default, sampler for random search, source.

Where the paper (arXiv 2602.23777) gives a value it is the default. Where it is silent the default is that of
InternVL's own fine-tuning scripts (github.com/OpenGVLab/InternVL, internvl_chat/shell), or the row gives the reason for
another. The scripts have AdamW, a cosine after 3% of warm-up, weight decay 0.05, gradients clipped at norm 1 (the
Trainer's default), and for LoRA alpha at twice the rank, dropout 0.05 and a rate of 4e-5.
"""

from __future__ import annotations

from domainbed_reasoning.hparam_checks import (
    ABOVE_0,
    ABOVE_0_TO_1,
    FLAG,
    FROM_0,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    TEXT,
    integer,
    one_of,
)
from domainbed_reasoning.registry import EMBEDDED_MODELS, Hparam

RESUME_HPARAMS = {
    "resume": Hparam(
        True, None, "started again, a killed job goes on; its state is in the user's cache folder", allowed=FLAG
    ),
}

MODEL_HPARAMS = {
    **RESUME_HPARAMS,
    "model": Hparam(
        "OpenGVLab/InternVL3-8B-hf", None, "the paper's backbone", embedded=EMBEDDED_MODELS.get, allowed=TEXT
    ),
    "dtype": Hparam(
        "auto",
        None,
        "bfloat16 on CUDA as checkpoints were trained, float32 on CPU; float16 only answers",
        allowed=one_of("auto", "float32", "bfloat16", "float16"),
    ),
    "quantize": Hparam(
        "none", None, "the paper's; nf4 or int8 (bitsandbytes) for smaller GPUs", allowed=one_of("none", "nf4", "int8")
    ),
    "max_tiles": Hparam(
        1,
        None,
        "not published; one tile costs 256 tokens an image, 4 are 2 x 2 and the whole: 1280",
        allowed=integer(1),
    ),
    "data_augmentation": Hparam(
        False, None, "chains name colors, sides and views, which DomainBed's would change", allowed=FLAG
    ),
    "answer": Hparam(
        "chain", None, "the paper reads answers from the chain's conclusion", allowed=one_of("chain", "label")
    ),
    "answer_matching": Hparam(
        "tolerant",
        None,
        "not published; conclusions are compared after normalization; or exact",
        allowed=one_of("tolerant", "exact"),
    ),
    "on_parse_failure": Hparam(
        "label",
        None,
        "not published; a chain that names no class falls back on the label path; wrong: it counts as wrong",
        allowed=one_of("label", "wrong"),
    ),
    "both_answers": Hparam(True, None, "the other answer is recorded too, at the last evaluation", allowed=FLAG),
    "votes": Hparam(
        1,
        None,
        "the paper's one chain; more: the majority of so many sampled chains (arXiv 2203.11171)",
        allowed=integer(1),
    ),
    "vote_temperature": Hparam(0.7, None, "of the chains that vote; as in arXiv 2203.11171", allowed=FROM_0),
    "max_new_tokens": Hparam(
        512, None, "twice the paper's chains (about 250 tokens)", embedded=112, allowed=integer(1)
    ),
    "eval_batch": Hparam(
        64, None, "images answered at a time: 8B holds 4 GiB of keys and values for 64", allowed=integer(1)
    ),
    "first_evaluation": Hparam(
        0, None, "DomainBed evaluates after step 1 too; before this one scores are all alike", allowed=integer(0)
    ),
    # DomainBed's batch size is per domain: 43 x 3 source domains = 129, the paper's 128.
    "batch_size": Hparam(
        43, lambda r: int(2 ** r.uniform(3, 5.5)), "paper: 128 over three sources", embedded=6, allowed=integer(1)
    ),
}

TRAINING_HPARAMS = {
    "lr": Hparam(5e-4, lambda r: 10 ** r.uniform(-4.5, -3), "paper: 5e-4", embedded=4e-3, allowed=ABOVE_0),
    "weight_decay": Hparam(
        0.01,
        lambda r: r.choice([0.0, 0.01, 0.1]),
        "not published; InternVL's own is 0.05 at its rate 4e-5, 2e-6 a step; at the paper's 5e-4 0.01 is 5e-6",
        allowed=FROM_0,
    ),
    "lr_schedule": Hparam(
        "cosine",
        None,
        "not published; InternVL's own; linear and cosine end above 0; or constant",
        allowed=one_of("constant", "linear", "cosine"),
    ),
    "warmup": Hparam(
        0.03,
        None,
        "share of a stage's steps, rounded up, 2 at least; not published; InternVL's own",
        allowed=FROM_0_TO_1,
    ),
    "grad_clip": Hparam(
        0.0,
        None,
        "not published; off, InternVL's own is 1: a clip lets the label's larger gradient take most of the step",
        allowed=FROM_0,
    ),
    "lora_rank": Hparam(8, lambda r: int(r.choice([4, 8, 16])), "paper: 8", allowed=integer(1)),
    "lora_alpha": Hparam(
        16, lambda r: int(r.choice([8, 16, 32])), "not published; twice the rank, as InternVL's own", allowed=ABOVE_0
    ),
    "lora_dropout": Hparam(
        0.0,
        lambda r: r.choice([0.0, 0.05, 0.1]),
        "the paper names none; dropout nearly doubles what the backward pass keeps",
        allowed=FROM_0_BELOW_1,
    ),
    "lora_targets": Hparam(
        "both",
        None,
        "paper: vision encoder and language decoder; or vision, or language",
        allowed=one_of("both", "vision", "language"),
    ),
    "lora_projector": Hparam(False, None, "the paper names the two towers only", allowed=FLAG),
    "gradient_checkpointing": Hparam(False, None, "less memory for about a third more time", allowed=FLAG),
    "micro_batch": Hparam(
        4, None, "samples a backward pass; the update is the whole batch's", embedded=64, allowed=integer(1)
    ),
    "mtct_epochs": Hparam(
        3, None, "paper: 3 epochs; 6 of the embedded set, whose epochs are 19 steps", embedded=6, allowed=integer(0)
    ),
}

LABEL_HPARAMS = {"label_weight": Hparam(1.0, lambda r: r.choice([0.1, 0.3, 1.0]), "paper: 1 (eq. 1)", allowed=FROM_0)}
CHAIN_HPARAMS = {"chain_weight": Hparam(1.0, lambda r: r.choice([1.0]), "paper: 1 (eq. 1)", allowed=FROM_0)}
BALANCE_HPARAMS = {
    "gradient_balance": Hparam(
        "none",
        None,
        "paper: plain sum (eq. 1); norm: the label gradient as long as the chain's",
        allowed=one_of("none", "norm"),
    ),
}

SARR_HPARAMS = {
    "sarr_rounds": Hparam(3, lambda r: int(r.choice([1, 2, 3])), "paper: N = 3", allowed=integer(0)),
    "sarr_epochs": Hparam(
        3, None, "paper: 3 epochs each; 2 of the embedded set keep the demo short", embedded=2, allowed=integer(1)
    ),
    "sarr_epoch_over": Hparam(
        "all",
        None,
        "not published; all: N / B updates an epoch of N images; kept: N' / B of N' kept, other steps are surplus",
        allowed=one_of("all", "kept"),
    ),
    "temperature": Hparam(
        0.0,
        lambda r: r.choice([0.0, 0.7, 1.0]),
        "of self-labeling; not published; 0 is greedy, as evaluation",
        allowed=FROM_0,
    ),
    "top_p": Hparam(1.0, None, "of self-labeling; not published; 1 leaves nothing out", allowed=ABOVE_0_TO_1),
    "sarr_filter": Hparam(
        "conclusion",
        None,
        "paper: conclusion; well_formed: and five stages; consistent: and the chain supports its conclusion",
        allowed=one_of("conclusion", "well_formed", "consistent"),
    ),
    "sarr_votes": Hparam(
        1, None, "the paper's one chain an image; more: the majority's, at a temperature above 0", allowed=integer(1)
    ),
}
