"""Plans as text."""

from __future__ import annotations

from rosa_ds.memory.account import ACTIVATIONS, WORKING
from rosa_ds.models.no_numbers import Shape
from rosa_ds.planning.search import GIB, Choice, Machine, Planner


def choice_table(choices: list[Choice]) -> str:
    """One line a choice, GiB of one GPU and seconds of one step."""
    lines = [
        f"{'stage':>5} {'recompute':>9} {'micro-batch':>11} {'GPU, GiB':>9} {'host, GiB':>9} {'fits':>5} "
        f"{'sent, GiB':>10} {'compute, s':>10} {'send, s':>8}"
    ]
    lines += [
        f"{c.stage:>5} {_yes(c.checkpointing):>9} {c.micro_batch:>11} {c.peak / GIB:>9.2f} {c.host / GIB:>9.2f} "
        f"{_yes(c.fits):>5} {c.sent / GIB:>10.2f} {c.compute:>10.2f} {c.send:>8.2f}"
        for c in choices
    ]
    return "\n".join(lines)


def term_table(planner: Planner, machine: Machine, choice: Choice, length: int) -> str:
    """Every term of one choice, and its activations with and without checkpointing."""
    memory = choice.account.memory
    lines = [f"{name:30}{size / GIB:>10.3f} GiB" for name, size in memory.items() if size]
    shape = Shape(choice.micro_batch, length, length)
    for checkpointing in (False, True):
        found = planner.activations.of_rows(shape, checkpointing)
        how = "with checkpointing" if checkpointing else "without checkpointing"
        lines.append(f"{f'{ACTIVATIONS}, {how}':30}{found.saved / GIB:>10.3f} GiB, at most {found.peak / GIB:.3f}")
    lines.append(f"{'at the worst moment':30}{choice.peak / GIB:>10.3f} GiB of {machine.memory / GIB:.3f}")
    lines += [f"{f'a step, {name}':30}{size / GIB:>10.3f} GiB" for name, size in choice.account.traffic.items()]
    return "\n".join(lines)


def explain(planner: Planner, machine: Machine, least: Choice) -> str:
    """Why nothing fits, and what would make the most difference, in order."""
    memory = {name: size for name, size in least.account.memory.items() if size}
    largest = sorted(memory, key=lambda name: -memory[name])[:3]
    budget = machine.memory - machine.reserve
    advice = [f"more GPUs (--gpus {2 * machine.gpus}): base, optimizer and gradients are divided by them"]
    if memory.get(ACTIVATIONS, 0) + memory.get(WORKING, 0) > 0.3 * least.peak:
        advice.insert(0, "shorter rows (--length)")
    advice.append("a lower --rank or --density")
    held = ", ".join(f"{name} {memory[name] / GIB:.1f}" for name in largest)
    return (
        f"nothing fits: the least is {least.peak / GIB:.1f} GiB (stage {least.stage}, micro-batch {least.micro_batch}) of "
        f"{budget / GIB:.1f} a GPU; the largest terms are {held} GiB. Try, in this order: {'; '.join(advice)}"
    )


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
