"""The hyper-parameters of MLLM algorithms: default, sampler for random search, source.

Defaults are the paper's (arXiv 2602.23777) if it publishes a value. Otherwise they follow InternVL's fine-tuning
scripts (github.com/OpenGVLab/InternVL, internvl_chat/shell), or the row gives the reason for a different value. The
scripts use AdamW, a cosine schedule after 3% warm-up, weight decay 0.05 and gradients clipped at norm 1 (the Trainer's
default), and for LoRA an alpha of twice the rank, dropout 0.05 and a learning rate of 4e-5.
"""

from __future__ import annotations

from domainbed_reasoning.hparam_checks import (
    ABOVE_0,
    ABOVE_0_TO_1,
    FLAG,
    FROM_0,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NAMES_OR_NONE,
    REVISION,
    TEXT,
    TEXT_OR_NONE,
    integer,
    one_of,
)
from domainbed_reasoning.registry import EMBEDDED_MODELS, Hparam

RESUME_HPARAMS = {
    "resume": Hparam(
        True, None, "rerun a killed job to resume it; its state is in the user's cache folder", allowed=FLAG
    ),
}

TRACK_HPARAMS = {
    "track": Hparam(
        "none",
        None,
        "an experiment tracker that is fed from the job's records, offline unless its own variables say otherwise",
        allowed=one_of("none", "tensorboard", "wandb", "mlflow", "trackio"),
    ),
}

MODEL_HPARAMS = {
    **RESUME_HPARAMS,
    **TRACK_HPARAMS,
    "model": Hparam(
        "OpenGVLab/InternVL3-8B-hf", None, "the paper's backbone", embedded=EMBEDDED_MODELS.get, allowed=TEXT
    ),
    "revision": Hparam(
        None, None, "pins a hub checkpoint to a branch, tag or commit; null is its main branch", allowed=REVISION
    ),
    "trust_remote_code": Hparam(
        False, None, "transformers' own; true runs Python files that come with the checkpoint", allowed=FLAG
    ),
    "dtype": Hparam(
        "auto",
        None,
        "bfloat16 on CUDA, as checkpoints were trained; float32 on CPU; float16 for evaluation only",
        allowed=one_of("auto", "float32", "bfloat16", "float16"),
    ),
    "quantize": Hparam(
        "none", None, "the paper's; nf4 or int8 (bitsandbytes) for smaller GPUs", allowed=one_of("none", "nf4", "int8")
    ),
    "attn_implementation": Hparam(
        "auto",
        None,
        "speed only; auto is sdpa; others take no masks of shared prefixes: two rows a sample, a row a class name",
        allowed=one_of("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"),
    ),
    "max_tiles": Hparam(
        1,
        None,
        "not published; one tile costs 256 tokens per image; 4 are 2 x 2 and a thumbnail: 1280",
        allowed=integer(1),
    ),
    "tiling": Hparam(
        "square",
        None,
        "not published; a square grid; dynamic: InternVL's own, the aspect ratio's grid of up to max_tiles tiles",
        allowed=one_of("square", "dynamic"),
    ),
    "data_augmentation": Hparam(
        False, None, "chains name colors, sides and views, which DomainBed's would change", allowed=FLAG
    ),
    "answer": Hparam(
        "chain", None, "the paper reads the answer from the chain's conclusion", allowed=one_of("chain", "label")
    ),
    "answer_matching": Hparam(
        "tolerant",
        None,
        "not published; conclusions are normalized before comparison; or exact",
        allowed=one_of("tolerant", "exact"),
    ),
    "on_parse_failure": Hparam(
        "label",
        None,
        "not published; a chain that names no class falls back to the label path; wrong: it counts as wrong",
        allowed=one_of("label", "wrong"),
    ),
    "both_answers": Hparam(True, None, "also record the other answer at the last evaluation", allowed=FLAG),
    "votes": Hparam(
        1,
        None,
        "the paper's single chain; more: majority vote over this many sampled chains (arXiv 2203.11171)",
        allowed=integer(1),
    ),
    "vote_temperature": Hparam(0.7, None, "for sampling the voting chains; as in arXiv 2203.11171", allowed=FROM_0),
    "max_new_tokens": Hparam(
        512, None, "twice the paper's chains (about 250 tokens)", embedded=112, allowed=integer(1)
    ),
    "eval_batch": Hparam(
        256,
        None,
        "answers generated at a time, fewer where they do not fit; an 8B model needs 12 GiB of KV cache for 256",
        embedded=64,
        allowed=integer(1),
    ),
    "first_evaluation": Hparam(
        0,
        None,
        "skip evaluations before this step (equal scores); DomainBed evaluates after step 1 too",
        allowed=integer(0),
    ),
    # DomainBed's batch size is per domain: 43 x 3 source domains = 129, close to the paper's 128.
    "batch_size": Hparam(
        43, lambda r: int(2 ** r.uniform(3, 5.5)), "paper: 128 over three sources", embedded=6, allowed=integer(1)
    ),
}

TRAINING_HPARAMS = {
    "lr": Hparam(5e-4, lambda r: 10 ** r.uniform(-4.5, -3), "paper: 5e-4", embedded=4e-3, allowed=ABOVE_0),
    "weight_decay": Hparam(
        0.01,
        lambda r: r.choice([0.0, 0.01, 0.1]),
        "not published; InternVL: 0.05 at lr 4e-5, 2e-6 per step; 0.01 at the paper's 5e-4 is 5e-6",
        allowed=FROM_0,
    ),
    "lr_schedule": Hparam(
        "cosine",
        None,
        "not published; InternVL's; linear and cosine end above 0; or constant",
        allowed=one_of("constant", "linear", "cosine"),
    ),
    "warmup": Hparam(
        0.03,
        None,
        "share of a stage's steps, rounded up, at least 2; not published; InternVL's",
        allowed=FROM_0_TO_1,
    ),
    "grad_clip": Hparam(
        0.0,
        None,
        "not published; off (InternVL: 1): with clipping, the larger label gradient would dominate the step",
        allowed=FROM_0,
    ),
    "lora_rank": Hparam(8, lambda r: int(r.choice([4, 8, 16])), "paper: 8", allowed=integer(1)),
    "lora_alpha": Hparam(
        16, lambda r: int(r.choice([8, 16, 32])), "not published; twice the rank, as InternVL", allowed=ABOVE_0
    ),
    "lora_dropout": Hparam(
        0.0,
        lambda r: r.choice([0.0, 0.05, 0.1]),
        "the paper names none; dropout nearly doubles the activations kept for the backward pass",
        allowed=FROM_0_BELOW_1,
    ),
    "lora_targets": Hparam(
        "both",
        None,
        "paper: vision encoder and language decoder; or vision, or language",
        allowed=one_of("both", "vision", "language"),
    ),
    "lora_projector": Hparam(False, None, "the paper names the two towers only", allowed=FLAG),
    "lora_target_modules": Hparam(
        None,
        None,
        'null: all layers that lora_targets and lora_projector choose; or those of these names: ["q_proj", "v_proj"]',
        allowed=NAMES_OR_NONE,
    ),
    "lora_variant": Hparam(
        "lora",
        None,
        "the paper's; rslora: scaled by alpha / √rank (arXiv 2312.03732); dora: magnitudes too (arXiv 2402.09353)",
        allowed=one_of("lora", "rslora", "dora"),
    ),
    "init_adapter": Hparam(
        None, None, "null: adapters start anew; or the folder of a PEFT adapter to start from", allowed=TEXT_OR_NONE
    ),
    "average_adapters": Hparam(
        False,
        None,
        "the paper's last weights; true: the mean of the weights at a stage's evaluations, as SWAD (arXiv 2102.08604)",
        allowed=FLAG,
    ),
    "gradient_checkpointing": Hparam(False, None, "saves memory, takes about a third more time", allowed=FLAG),
    "micro_batch": Hparam(
        4, None, "samples per backward pass; the update uses the whole batch", embedded=64, allowed=integer(1)
    ),
    "mtct_epochs": Hparam(
        3, None, "paper: 3 epochs; 6 for the embedded dataset, with 19 steps each", embedded=6, allowed=integer(0)
    ),
}

LABEL_HPARAMS = {"label_weight": Hparam(1.0, lambda r: r.choice([0.1, 0.3, 1.0]), "paper: 1 (eq. 1)", allowed=FROM_0)}
CHAIN_HPARAMS = {"chain_weight": Hparam(1.0, lambda r: r.choice([1.0]), "paper: 1 (eq. 1)", allowed=FROM_0)}
BALANCE_HPARAMS = {
    "gradient_balance": Hparam(
        "none",
        None,
        "paper: plain sum (eq. 1); norm: scale the label gradient to the norm of the chain's",
        allowed=one_of("none", "norm"),
    ),
    "chain_weighting": Hparam(
        "constant",
        None,
        "paper: constant (eq. 1); falling_loss: times exp(-L), L the stage's running chain loss; 0 in its first update",
        allowed=one_of("constant", "falling_loss"),
    ),
}

SARR_HPARAMS = {
    "sarr_rounds": Hparam(3, lambda r: int(r.choice([1, 2, 3])), "paper: N = 3", allowed=integer(0)),
    "sarr_epochs": Hparam(
        3, None, "paper: 3 epochs each; 2 for the embedded dataset keep the demo short", embedded=2, allowed=integer(1)
    ),
    "sarr_epoch_over": Hparam(
        "all",
        None,
        "not published; all: N / B updates per epoch of N images; kept: N' / B for N' kept ones, the rest are skipped",
        allowed=one_of("all", "kept"),
    ),
    "temperature": Hparam(
        0.0,
        lambda r: r.choice([0.0, 0.7, 1.0]),
        "for self-labeling; not published; 0 is greedy, as in evaluation",
        allowed=FROM_0,
    ),
    "top_p": Hparam(1.0, None, "for self-labeling; not published; 1 disables nucleus sampling", allowed=ABOVE_0_TO_1),
    "sarr_filter": Hparam(
        "conclusion",
        None,
        "paper: conclusion; well_formed: also all five stages; consistent: also a chain that supports its conclusion",
        allowed=one_of("conclusion", "well_formed", "consistent"),
    ),
    "sarr_votes": Hparam(
        1, None, "the paper's single chain per image; more: majority, at a temperature above 0", allowed=integer(1)
    ),
}
