"""Train the embedded base model: `make base-model` (about an hour on two CPU cores).

Tokenizer (byte-level BPE), a 3 M-parameter Llama and its card, from the conversations of role "base" in
`salsa.demo`. Muon for the matrices and AdamW for the rest; each epoch cuts the conversations elsewhere and swaps the
speakers, which is the only augmentation. Interrupted, it goes on from `--work` when started again.
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from salsa import demo
from salsa.runtime.checkpoint import load_state, save_state
from salsa.runtime.engine import reuse_freed_memory

BOS, PAD, END, USER, ASSISTANT = "<|bos|>", "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('this model knows only the roles user and assistant') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pack(
    conversations: list[list[list[int]]], length: int, ids: dict, rng: random.Random
) -> np.ndarray:
    """One epoch as rows of `length` tokens: conversations cut into excerpts of random turns, then concatenated."""
    stream: list[list[int]] = []
    for turns in conversations:
        start, speaker = 0, rng.randrange(2)
        while start < len(turns):
            stop = start + rng.randint(2, 12)
            excerpt = [ids[BOS]]
            for turn in turns[start:stop]:
                excerpt += [ids[USER] if speaker == 0 else ids[ASSISTANT], *turn, ids[END]]
                speaker = 1 - speaker
            stream.append(excerpt)
            start = stop
    rng.shuffle(stream)
    flat = np.fromiter((token for excerpt in stream for token in excerpt), dtype=np.int64)
    rows = len(flat) // length
    return flat[: rows * length].reshape(rows, length)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A 3 M-parameter Llama from seed 0."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=5,
            num_attention_heads=3,
            num_key_value_heads=3,
            intermediate_size=512,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and gains."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=4e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy, nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten()
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor, batch: int) -> float:
    """Mean loss over whole batches of the validation conversations."""
    losses = [
        loss_of(model, rows[i : i + batch]).item() for i in range(0, len(rows) - batch + 1, batch)
    ]
    return sum(losses) / len(losses)


def restore(
    state_file: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Put the last state back; the number of steps behind it."""
    state = load_state(state_file)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def main() -> None:
    """Train, resume if there is something to resume, write the model directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/salsa/assets/base"))
    parser.add_argument("--work", type=Path, default=Path("runs/base-model"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    reuse_freed_memory()

    train_texts = [turns for turns, _ in demo.conversations("base")]
    valid_texts = [turns for turns, _ in demo.conversations("validation") if len(turns) > 1]
    tokenizer = train_tokenizer([turn for turns in train_texts for turn in turns], args.vocab_size)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (BOS, END, USER, ASSISTANT)}

    def encode(texts: list[list[str]]) -> list[list[list[int]]]:
        return [tokenizer(turns)["input_ids"] for turns in texts]

    train, valid = encode(train_texts), encode(valid_texts)
    valid_rows = torch.from_numpy(pack(valid, args.length, ids, random.Random(0)))
    train_tokens = sum(len(turn) + 2 for turns in train for turn in turns)
    print(
        f"{len(train)} conversations, {train_tokens} tokens; held out {valid_rows.numel()} tokens",
        flush=True,
    )

    model = build_model(tokenizer)
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    state_file = args.work / "state.pt"
    first = restore(state_file, model, optimizers)
    compiled_loss = torch.compile(loss_of)

    epoch, rows, started = -1, None, time.time()
    for step in range(first, args.steps):
        warmup, decay = min(1.0, (step + 1) / 100), max(0.0, 1 - step / args.steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(warmup, decay)
        per_epoch = train_tokens // (args.batch * args.length)
        if rows is None or step // per_epoch != epoch:
            epoch = step // per_epoch
            rows = torch.from_numpy(pack(train, args.length, ids, random.Random(epoch + 1)))
        at = (step % per_epoch) * args.batch
        loss = compiled_loss(model, rows[at : at + args.batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            record = {
                "step": step + 1,
                "loss": round(loss.item(), 4),
                "held_out_loss": round(held_out_loss(model, valid_rows, args.batch), 4),
                "seconds": round(time.time() - started, 1),
            }
            print(json.dumps(record), flush=True)
            with (args.work / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            state = {"model": model.state_dict(), "step": step + 1}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save_state(state_file, state)

    record = json.loads((args.work / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(args.out, ignore_errors=True)
    model.generation_config.max_length = None
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for file in args.out.iterdir():
        file.chmod(0o644)
    write_card(args, record, model, len(train), train_tokens)


def write_card(
    args: argparse.Namespace, record: dict, model: LlamaForCausalLM, conversations: int, tokens: int
) -> None:
    """The model card: what it is, what it was made of, how to make it again."""
    values = {
        "millions": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "epochs": f"{args.steps * args.batch * args.length / tokens:.1f}",
        "conversations": conversations,
        "tokens": tokens,
        "loss": record["held_out_loss"],
        **vars(args),
    }
    card = Path(__file__).with_name("base_model_card.md").read_text(encoding="utf-8")
    (args.out / "README.md").write_text(card.format(**values), encoding="utf-8")


if __name__ == "__main__":
    main()
