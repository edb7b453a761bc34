"""`distmuon advise MODEL --task TASK`: whether to use Muon, rule by rule, each with its evidence and its strength.

This module decides the advice. A rule says how strong it is: "computed" from this model, "measured here" (a page of the
project has the conditions), "paper" (arXiv 2502.16982), "common advice" that was not tested here, or "contradicted
here", for common advice that does not hold with this library. The answer comes from the task, the matrices of the model
and the cost of Newton-Schulz beside forward and backward. Status 1: AdamW is advised.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from distmuon.cli.arguments import Parser
from distmuon.cli.models import HELP, Named, find_model
from distmuon.cli.route import Table, make_table
from distmuon.errors import problem
from distmuon.math.newton_schulz import flops
from distmuon.planning.verdict import active_elements

Task = Literal["pretrain", "continue", "finetune", "lora"]
Answer = Literal["Muon", "AdamW", "try both"]
Strength = Literal["computed", "measured here", "paper", "common advice", "contradicted here"]

NS_STEPS = 5
CHEAP, DEAR = 0.1, 0.5  # judgement: shares of forward and backward; Muon saves about half of the steps at best
TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Rule:
    """One piece of advice about the model."""

    topic: str
    advice: str
    evidence: str
    strength: Strength


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules know of the model and of the run."""

    task: Task
    pretrained_with: str
    tokens: int
    table: Table
    newton_schulz: float  # FLOPs of Newton-Schulz, as a share of those of forward and backward

    @property
    def share(self) -> float:
        """Muon's share of the elements."""
        return self.table.elements("muon") / self.table.elements()


def main(argv: Sequence[str]) -> int:
    """Print the advice for the arguments; return the exit status."""
    given = _parser().parse_args(argv)
    try:
        if given.tokens is not None and given.tokens < 1:
            raise problem(
                "--tokens", found=f"found {given.tokens}", needed="a positive number is needed", cure="correct it"
            )
        named = find_model(given.model)
        facts = _facts(named, given.task, given.pretrained_with, given.tokens or named.tokens or TOKENS)
    except (ValueError, OSError, ImportError) as error:
        print(f"distmuon advise: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    answer, why = decide(facts)
    rules = list(rules_for(facts))
    if given.json:
        found = {"model": named.name, "task": facts.task, "answer": answer, "why": why}
        print(json.dumps(found | {"rules": [asdict(rule) for rule in rules]}, indent=2))
    else:
        print(f"{named.name}, {facts.task}: {answer}. {why}")
        for rule in rules:
            print(f"\n{rule.topic} [{rule.strength}]")
            for text in (rule.advice, f"Evidence: {rule.evidence}"):
                print(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="  "))
    return int(answer == "AdamW")


def _parser() -> Parser:
    parser = Parser(
        prog="distmuon advise",
        description="Whether Muon suits a model and a task: an answer, and the rules behind it with their evidence.",
        epilog="examples: distmuon advise llama-1b --task pretrain --tokens 1000000; distmuon advise "
        "path/to/config.json --task finetune --pretrained-with muon. Exit status: 0; "
        "1 if AdamW is advised; 2 for bad input.",
    )
    parser.add_argument("model", help=HELP)
    parser.add_argument("--task", choices=get_args(Task), required=True, help="what the model is trained for")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"tokens of a step, on all ranks (default {TOKENS:,})")
    parser.add_argument(
        "--pretrained-with",
        choices=("adamw", "muon"),
        default="adamw",
        help="for continue and finetune: the optimizer that pretrained the model (default adamw, as nearly all)",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of the text")
    return parser


def _facts(named: Named, task: Task, pretrained_with: str, tokens: int) -> Facts:
    table = make_table(named.model, named.routes)
    specs, experts = table.specs, named.experts_per_token
    active = active_elements(specs, experts) if experts else table.elements()
    work = sum(flops(m, n, NS_STEPS) for spec in specs for unit in spec.matrices for m, n in unit.logical_shapes)
    return Facts(task, pretrained_with, tokens, table, work / (6 * active * tokens))


def decide(facts: Facts) -> tuple[Answer, str]:
    """The answer and the reason for it."""
    if not facts.table.elements("muon"):
        return "AdamW", "The model has no hidden matrix that Muon could update."
    if facts.task == "lora":
        return "AdamW", "Adapters go to AdamW."
    if facts.task == "finetune":
        if facts.pretrained_with == "muon":
            return "Muon", "Muon pretrained the model, and a change of the optimizer costs quality."
        return "AdamW", "AdamW pretrained the model, and a change of the optimizer may cost quality."
    if facts.newton_schulz > DEAR:
        share = f"{facts.newton_schulz:.0%}"
        return "AdamW", f"At {facts.tokens:,} tokens a step Newton-Schulz alone is {share} of forward and backward."
    if facts.task == "continue" and facts.pretrained_with == "adamw":
        return "try both", "AdamW pretrained the model; nobody has measured here how long Muon takes to make up for it."
    if facts.newton_schulz > CHEAP:
        return "try both", f"Newton-Schulz is {facts.newton_schulz:.0%} of forward and backward; larger batches help."
    return "Muon", f"Newton-Schulz is {facts.newton_schulz:.1%} of forward and backward, and Muon needs fewer steps."


def rules_for(facts: Facts) -> Iterator[Rule]:
    """Yield the rules that concern the model and the task, the weightiest first."""
    yield from _task_rules(facts)
    yield from _cost_rules(facts)
    yield from _parameter_rules(facts)
    yield from _setting_rules(facts)


def _task_rules(facts: Facts) -> Iterator[Rule]:
    if facts.task == "pretrain":
        yield Rule(
            "Pretraining",
            "Use Muon for pretraining from random weights, if the time or compute of training is what limits you.",
            "about half of AdamW's training FLOPs for the same loss, models up to 16B parameters (arXiv 2502.16982, "
            "section 3). Here only a byte-level Llama of 1.9 M parameters was trained: 89 steps where AdamW took 200, "
            "each at its best learning rate (docs/quickstart.md).",
            "paper",
        )
    elif facts.task == "continue":
        yield Rule(
            "Continued pretraining",
            "Go on with the optimizer that pretrained the model; over many tokens Muon may still pay after AdamW.",
            "no trial here is long enough to decide it.",
            "common advice",
        )
    if facts.task in ("finetune", "lora", "continue"):
        yield Rule(
            "Fine-tuning",
            "Keep the optimizer of the pretraining, AdamW for nearly every published model, unless a trial of your own "
            "says otherwise.",
            "arXiv 2502.16982, tables 6 and 7: either change of the optimizer lowers most scores. A trial here with "
            "0.14 M parameters says the opposite for models of AdamW, and is too small to overturn it "
            "(docs/integrations.md, Fine-tuning).",
            "paper",
        )
        yield Rule(
            "Learning rate of fine-tuning",
            "Search it anew; a rate 10 to 20 times below that of pretraining is no rule.",
            "in the trial here Muon's best rate on a model that Muon pretrained was the pretraining rate itself "
            "(docs/integrations.md).",
            "contradicted here",
        )
    if facts.task == "lora":
        yield Rule(
            "LoRA",
            'Use AdamW for adapters: DistMuon(model, routes="adamw"). Muon on the factors can be asked for by a route.',
            "adapters are routed to AdamW by default; both forms equal a single process on two ranks "
            "(docs/integrations.md). Which of the two learns better was not measured here.",
            "common advice",
        )


def _cost_rules(facts: Facts) -> Iterator[Rule]:
    yield Rule(
        "Cost of Newton-Schulz",
        f"It is {facts.newton_schulz:.2%} of the FLOPs of forward and backward at {facts.tokens:,} tokens a step, and "
        "falls as 1 / tokens. `distmuon plan` estimates the time on given hardware.",
        f"{NS_STEPS} iterations over all matrices of this model, against 6 x parameters x tokens.",
        "computed",
    )
    total = facts.table.elements()
    if total < 100_000_000:
        yield Rule(
            "Small models",
            f"The model has {total:,} parameters. That is no reason against Muon: the cost depends on the sides of "
            "the matrices and on the tokens of a step, not on the number of parameters.",
            "on a CPU a step of a small model with 16k tokens a rank takes as long as with AdamW, 1.00 "
            "(docs/benchmarks.md); "
            "the usual limit of 50 or 100 M parameters does not follow from the arithmetic.",
            "contradicted here",
        )
    muon = facts.table.elements("muon")
    adamw_bytes, muon_bytes = 8 * total, 4 * muon + 8 * (total - muon)
    yield Rule(
        "Memory",
        f"State, without masters, is {muon_bytes / 1e9:.3f} GB over all ranks; AdamW's is {adamw_bytes / 1e9:.3f} GB. "
        "Where memory is short, fewer Newton-Schulz iterations, as is often advised, save none; "
        "Precision(momentum=torch.int8) and Sharding(release_grads=True) do.",
        "4 bytes an element of Muon, 8 of AdamW; the workspace is that of three buckets, whatever the number of "
        "iterations (docs/planner.md, docs/options.md).",
        "contradicted here",
    )


def _parameter_rules(facts: Facts) -> Iterator[Rule]:
    yield Rule(
        "Embeddings, head, norms and biases",
        f"They stay with AdamW: {1 - facts.share:.1%} of the elements. Muon updates {facts.share:.1%}. "
        "`distmuon route` lists each with the reason; first convolutions and matrices below 256 elements are "
        "AdamW's too.",
        "arXiv 2502.16982, section 2; done by default (docs/routing.md).",
        "paper",
    )
    if facts.table.proposed:
        yield Rule(
            "Undecided weights",
            f"Say what they are before training: DistMuon(model, {facts.table.paste}).",
            "neither their modules nor their names decide the rule, and Muon is never guessed.",
            "computed",
        )
    matrices = [row for row in facts.table.rows if row.matrices]
    if any(len(row.matrices) > 1 and len(row.shape) == 3 for row in matrices):
        yield Rule(
            "Experts",
            "Each expert is a matrix of its own. Routers are Muon's too; a route sends them to AdamW.",
            "the paper's 16B model is a mixture of experts with Muon on experts and routers; loss was not "
            "measured here.",
            "paper",
        )
    if any(len(row.shape) > 3 for row in matrices):
        yield Rule(
            "Convolutions",
            "A filter is the matrix out x (in * kernel). Compare with AdamW: the evidence for Muon is from "
            "language models.",
            "no image model was trained to convergence here.",
            "common advice",
        )
    sides = [side for row in matrices for shape in row.matrices for side in shape]
    if sides:
        yield Rule(
            "Long sequences",
            "They do not make Muon dearer, as is sometimes said: weights are orthogonalized, not N x N attention "
            f"scores. The longest side in this model is {max(sides):,}.",
            "the matrices of a model do not depend on the length of a sequence.",
            "contradicted here",
        )


def _setting_rules(facts: Facts) -> Iterator[Rule]:
    if facts.task in ("pretrain", "continue"):
        yield Rule(
            "Learning rate",
            "Start at AdamW's rate, with weight decay 0.1, and go up by factors of two until the loss turns. The rate "
            "0.02 belongs to another scale of the update, adjust_lr_fn='original'.",
            "the update is scaled to AdamW's RMS by 0.2*sqrt(max(m, n)); in three short grids Muon's best rate "
            "was 2, 4 and 16 times AdamW's (docs/quickstart.md).",
            "measured here",
        )
    yield Rule(
        "Precision of Newton-Schulz",
        "Float32, which is often advised, is not needed: the default is bfloat16. "
        "Precision(newton_schulz=torch.float32) is there for a comparison.",
        "errors of both are measured in docs/newton_schulz.md; the matrix is normalized before it is rounded.",
        "contradicted here",
    )
