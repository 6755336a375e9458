"""RD-MLDG as one assembles it from other libraries: TRL's SFTTrainer, `generate`, and a forward pass a class name.

    python -m benchmarks.assembled_job STARTED JOB.json       # as `whole_job` starts it

Algorithm 1 as printed: MTCT on the teacher's chains; in each round, `generate` answers q_reason for every training
image, and a new trainer tunes on the chains that conclude with the label. A batch has as many images as ours: in a
round as many as ours keeps on average. Images, splits, chains, questions and the rule of acceptance are this package's.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.parts import IMPORTS, Parts

END_OF_CHAIN = "</CONCLUSION>"
MODEL, DATA, TRAINING, ANSWERS, SAVING = "model", "data", "training", "answers", "saving"


class Assembled:
    """A transformers model with PEFT's adapters, trained by TRL.

    Args:
        job: settings, see `whole_job.settings`.
        parts: timers of the process.

    Attributes:
        model: the PEFT model.
        tokens: generated so far, padding left out.
        accuracies: of every evaluation, by split.
        first_update: seconds from the process's start to the end of its first update; 0 before.
    """

    def __init__(self, job: dict[str, Any], parts: Parts):
        with parts.part(IMPORTS):
            import peft
            import torch
            import transformers
        self.job, self.parts, self.tokens = job, parts, 0
        self.accuracies: list[dict[str, float]] = []
        self.first_update = 0.0
        torch.manual_seed(job["seed"])
        with parts.part(MODEL):
            network = transformers.AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32)
            adapters = peft.LoraConfig(
                r=job["lora_rank"], lora_alpha=job["lora_alpha"], target_modules=job["lora_targets"]
            )
            self.model: Any = peft.get_peft_model(network, adapters)
            self.processor = transformers.AutoProcessor.from_pretrained(job["model"])
        with parts.part(DATA):
            from domainbed_reasoning.images import shapes

            keys = [(env, index) for split in job["splits"].values() for env, index in split]
            self.pictures = {
                (env, index): shapes.render(env, index, misleading=env in job["test_envs"]) for env, index in keys
            }
            self.labels = {key: shapes.label(*key) for key in keys}

    def prompt(self, question: str) -> str:
        """Return a question as the chat template writes it."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return text

    def inputs(self, keys: Sequence[tuple[int, int]], texts: Sequence[str]) -> Any:
        """Return a padded batch of images and texts."""
        pictures = [[self.pictures[key]] for key in keys]
        return self.processor(
            images=pictures, text=list(texts), crop_to_patches=False, padding=True, return_tensors="pt"
        )

    def write(self, keys: Sequence[tuple[int, int]]) -> list[str]:
        """Return greedy chains of images."""
        import torch

        batch = self.inputs(keys, [self.prompt(self.job["q_reason"])] * len(keys))
        with torch.no_grad():
            out = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=self.job["max_new_tokens"],
                stop_strings=[END_OF_CHAIN],
                tokenizer=self.processor.tokenizer,
            )
        chains = out[:, batch["input_ids"].shape[1] :]
        self.tokens += int((chains != self.processor.tokenizer.pad_token_id).sum())
        return [text.strip() for text in self.processor.tokenizer.batch_decode(chains, skip_special_tokens=True)]

    def classes(self, keys: Sequence[tuple[int, int]]) -> list[int]:
        """Return the most likely class of images: the sum over the tokens of each name and its end, in nats."""
        import torch

        prompt, scores = self.prompt(self.job["q_cls"]), []
        length = self.inputs(keys[:1], [prompt])["input_ids"].shape[1]
        for name in self.job["class_names"]:
            batch = self.inputs(keys, [prompt + name + self.job["end"]] * len(keys))
            target = batch["input_ids"][:, length:]
            with torch.no_grad():
                logits = self.model(**batch, use_cache=False, logits_to_keep=target.shape[1] + 1).logits[:, :-1]
            scores.append(logits.log_softmax(-1).gather(2, target[..., None])[..., 0].sum(1))
        return torch.stack(scores, dim=1).argmax(1).tolist()

    def answer(self, keys: Sequence[tuple[int, int]], both: bool) -> tuple[list[str], list[int]]:
        """Return chains and classes of a split; classes by the chain unless both, by the name where it has none."""
        from domainbed_reasoning.chains.reader import read_conclusion

        chains: list[str] = []
        classes: list[int] = []
        for start in range(0, len(keys), self.job["eval_batch"]):
            part = keys[start : start + self.job["eval_batch"]]
            written = self.write(part)
            found = [read_conclusion(chain, self.job["class_names"]).answer for chain in written]
            asked = [key for key, answer in zip(part, found, strict=True) if both or answer is None]
            by_name = dict(zip(asked, self.classes(asked), strict=True)) if asked else {}
            chains += written
            classes += [by_name.get(key, answer) for key, answer in zip(part, found, strict=True)]
        return chains, classes

    def evaluate(self, both: bool) -> None:
        """Add the accuracy on every split; see `answer`."""
        self.model.eval()
        with self.parts.part(ANSWERS):
            accuracies = {}
            for name, keys in self.job["splits"].items():
                _, classes = self.answer(keys, both)
                right = [self.labels[key] == answer for key, answer in zip(keys, classes, strict=True)]
                accuracies[name] = sum(right) / len(right)
        self.accuracies.append(accuracies)
        self.model.train()

    def label(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """Return the chains of a round that are kept."""
        from domainbed_reasoning.method.self_labeling import accept

        self.model.eval()
        kept = {}
        with self.parts.part(ANSWERS):
            for start in range(0, len(keys), self.job["eval_batch"]):
                part = keys[start : start + self.job["eval_batch"]]
                for key, chain in zip(part, self.write(part), strict=True):
                    if (accepted := accept(chain, self.labels[key], self.job["class_names"])) is not None:
                        kept[key] = accepted
        self.model.train()
        return kept

    def train(
        self, chains: dict[tuple[int, int], str], images: int, steps: int, after: Sequence[int], last: bool = False
    ) -> None:
        """Tune on both questions about every image.

        Args:
            chains: by image.
            images: of a batch, each with two questions.
            steps: updates.
            after: those that an evaluation follows.
            last: whether the job ends with them; its last evaluation gives both answers.
        """
        with self.parts.part(IMPORTS):
            import datasets
            import transformers
            import trl
        job, outer = self.job, self
        with self.parts.part(DATA):
            rows = []
            for key, chain in chains.items():
                answers = {job["q_cls"]: job["class_names"][self.labels[key]], job["q_reason"]: chain}
                for question, answer in answers.items():
                    prompt = [{"role": "user", "content": question}]
                    completion = [{"role": "assistant", "content": answer}]
                    rows.append({"images": [self.pictures[key]], "prompt": prompt, "completion": completion})
            data = datasets.Dataset.from_list(rows)

        class Evaluations(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                outer.first_update = outer.first_update or outer.parts.since_start()
                if state.global_step in after:
                    outer.evaluate(both=last and state.global_step == steps)

        with self.parts.part(TRAINING):
            settings = trl.SFTConfig(
                output_dir=job["output_dir"],
                per_device_train_batch_size=2 * images,
                max_steps=steps,
                max_length=None,
                learning_rate=job["lr"],
                lr_scheduler_type="cosine",
                warmup_steps=2,
                weight_decay=job["weight_decay"],
                max_grad_norm=0.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=job["seed"],
            )
            trainer = trl.SFTTrainer(
                model=self.model,
                args=settings,
                train_dataset=data,
                processing_class=self.processor,
                callbacks=[Evaluations()],
            )
            trainer.train()


def run_job(job: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """Train and evaluate; return what is compared."""
    from domainbed_reasoning.images import shapes

    assembled = Assembled(job, parts)
    keys = [key for name, split in job["splits"].items() for key in split if name in job["training_splits"]]
    first, *rounds = job["steps"]
    assembled.train({key: shapes.chain(*key) for key in keys}, job["images"], first, (1, first))
    shares = []
    for number, steps in enumerate(rounds, start=1):
        kept = assembled.label(keys)
        shares.append(len(kept) / len(keys))
        images = max(1, round(job["images"] * shares[-1]))
        assembled.train(kept, images, steps, (steps,), last=number == len(rounds))
    with parts.part(SAVING):
        assembled.model.save_pretrained(job["output_dir"])
    accuracies, tokens, first_update = assembled.accuracies, assembled.tokens, assembled.first_update
    return {"accuracies": accuracies, "tokens": tokens, "kept": shares, "first_update": first_update}


def main(argv: list[str]) -> int:
    """Run a job, write its results beside its settings."""
    started, file = argv
    parts = Parts(float(started))
    parts.watch_imports()
    job = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    job["splits"] = {name: [tuple(key) for key in keys] for name, keys in job["splits"].items()}
    found = run_job(job, parts)
    found |= {"parts": parts.finished()}
    (pathlib.Path(job["output_dir"]) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
