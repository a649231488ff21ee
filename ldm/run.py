"""A run in progress: its device and processes, its safe steps, its state, its end.

Everything that the two training loops share, and nothing of what they compute.
"""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import PositiveInt
from torch import Tensor, nn

from ldm.config import Config
from ldm.device import memory_format, resolve_precision
from ldm.distributed import fail_together, from_main, make_accelerator
from ldm.ema import Average
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.logbook import console, progress_bar
from ldm.run_folder import (
    clear_leftovers,
    latest_state,
    load_state,
    lock,
    new_or_unfinished,
    restore,
    save_state,
)
from ldm.seeds import torch_seed

MAX_BAD_STEPS = 10


class RunConfig(Config):
    """How a run is carried out and watched."""

    seed: int = 0
    """Seed of everything: weights at the start, order, crops, noise."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, or cuda:1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: networks under autocast, losses in float32. auto: bf16 where the device has it."""
    log_every_steps: PositiveInt = 50
    """Steps between two rows of metrics.jsonl."""
    validate_every_steps: PositiveInt = 1000
    """Steps between two looks at held-out images or samples (numbers and a picture)."""
    save_every_steps: PositiveInt = 1000
    """Steps between two saved states; a stop by Ctrl-C or SIGTERM saves as well."""
    keep_states: PositiveInt = 2
    """How many of the newest states are kept."""
    compile: bool = False
    """torch.compile the networks: slow first steps, then faster ones; needs a C++ compiler."""


class TrainingState:
    """Everything that training changes, and that an exact resume needs.

    Args:
        batch_size: images per step, over all processes and micro-batches.
        total_steps: steps of the whole run.

    Attributes:
        images_seen: images trained on, up to the last step.
        validated_at: images seen at the last validation.
        parts: networks, averages and optimisers, by their names in the saved state.
        averages: the parts that follow the weights after every step.
    """

    def __init__(self, batch_size: int, total_steps: int) -> None:
        self.batch_size, self.total_steps = batch_size, total_steps
        self.images_seen = self.validated_at = 0
        self.parts: dict[str, Any] = {}
        self.averages: list[Average] = []

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.images_seen // self.batch_size

    @property
    def is_last(self) -> bool:
        """True once the last step is taken."""
        return self.step == self.total_steps

    def advance(self) -> None:
        """Count a step, and let the averages follow its update."""
        self.images_seen += self.batch_size
        for average in self.averages:
            average.update(self.images_seen, self.batch_size)

    def due(self, every_steps: int) -> bool:
        """True every `every_steps` steps, and after the last one."""
        return self.is_last or self.step % every_steps == 0

    def owes_validation(self, every_steps: int) -> bool:
        """True if a validation was due when the run stopped, and not made."""
        return self.due(every_steps) and self.validated_at != self.images_seen

    def state_dict(self) -> dict[str, Any]:
        """The state of every part by its name, and the counts."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {"images_seen": self.images_seen, "validated_at": self.validated_at, **states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.images_seen = saved["images_seen"]
        # earlier versions validated after saving, and did not save this
        unknown = 0 if self.is_last else self.images_seen
        self.validated_at = saved.get("validated_at", unknown)
        restore(self.parts, saved)


class Run:
    """One run on this process: device, ranks, stepping, saving, stopping. See `start_run`."""

    def __init__(self, folder: Path, config: RunConfig, accelerator: Accelerator) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.device, self.seed = accelerator.device, config.seed
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.precision = resolve_precision(config.precision, self.device)
        self.skipped: Counter[str] = Counter()
        self._bad_in_a_row: Counter[str] = Counter()
        self._losses: dict[str, list[Tensor]] = {}
        self._stop = False

    # ------------------------------------------------------------------------------ stepping
    def prepare(self, module: nn.Module) -> nn.Module:
        """The module on this device, wrapped so that gradients sync between processes."""
        return self.accelerator.prepare_model(module)

    def compile(self, *modules: nn.Module) -> None:
        """Compile each in place, where the configuration asks for it; names in the state stay."""
        if not self.config.compile:
            return
        from torch._functorch import config

        # a graph may be walked twice (the ratio of two gradients): its buffers are not to be reused
        config.donated_buffer = False
        for module in modules:
            module.compile()

    def place(self, tensor_or_module: Any) -> Any:
        """Images or a module on this device, in the memory layout that is quick there."""
        layout = memory_format(self.device)
        if isinstance(tensor_or_module, Tensor):
            there = tensor_or_module.to(self.device, non_blocking=True)
            return there.contiguous(memory_format=layout)
        return tensor_or_module.to(self.device, memory_format=layout)

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module inside what `prepare` returned."""
        return self.accelerator.unwrap_model(module)

    def autocast(self) -> AbstractContextManager:
        """bf16 for networks where the precision says so."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """A batch must split evenly into micro-batches and over processes; UsageError if not."""
        if batch_size % (accumulate * self.world):
            raise UsageError(
                f"batch_size={batch_size} does not divide into {accumulate} micro-batch(es) on "
                f"{self.world} process(es): make it a multiple of {accumulate * self.world}"
            )

    def accumulate(self, *modules: nn.Module) -> AbstractContextManager:
        """One micro-batch; gradients sync and `step` updates at the last one of a batch."""
        return self.accelerator.accumulate(*modules)

    def seed_dropout(self, image: int) -> None:
        """Tie torch's own generators to (seed, image): nothing of theirs needs to be saved."""
        torch.manual_seed(torch_seed(self.seed, f"dropout {self.rank}", image))

    def step(
        self,
        loss: Tensor,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        what: str,
        clip_norm: float | None,
    ) -> Tensor | None:
        """Backward, and at the end of a batch clip and update; returns the gradient's norm then.

        A step whose loss or gradient is not finite is skipped and counted.

        Raises:
            LdmError: the tenth such step in a row; weights and saved states are still good.
        """
        self.accelerator.backward(loss)
        losses = self._losses.setdefault(what, [])
        losses.append(loss.detach())
        if not self.accelerator.sync_gradients:
            return None
        limit = float("inf") if clip_norm is None else clip_norm
        norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
        # the losses too: an infinite one can have finite gradients
        finite = torch.isfinite(torch.stack([norm, *losses])).all()
        losses.clear()
        if self.any_rank(not finite.item()):
            self._count_bad(what)
        else:
            optimizer.step()
            self._bad_in_a_row[what] = 0
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _count_bad(self, what: str) -> None:
        self.skipped[what] += 1
        self._bad_in_a_row[what] += 1
        if self._bad_in_a_row[what] < MAX_BAD_STEPS:
            return
        last = latest_state(self.folder / "state")
        raise LdmError(
            f"{what}: loss or gradient not finite in {MAX_BAD_STEPS} steps in a row; stopped. "
            f"Last good state: {last or 'none yet'}. The same command would meet it again: "
            "start a new run with a lower lr, or run.precision=fp32"
        )

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the processes, on every one of them."""
        return self.accelerator.reduce(tensor, "mean") if self.world > 1 else tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on every one of them."""
        return self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The processes' tensors (b, …) one after another, on every one of them."""
        return self.accelerator.gather(tensor) if self.world > 1 else tensor

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the main process, on all; what it raises ends all together."""
        return from_main(self.accelerator, make)

    # -------------------------------------------------------------------------------- saving
    def save(self, tree: dict[str, Any]) -> None:
        """Save the state to resume from (main process), whole or not at all."""
        if self.is_main:
            tree = {**tree, "skipped": dict(self.skipped)}
            save_state(self.folder / "state", tree["images_seen"], tree, self.config.keep_states)
        self.accelerator.wait_for_everyone()

    def resume(self) -> dict[str, Any] | None:
        """The newest saved state, or None for a run that starts; the same on every process."""
        # one process looks and all take its word: a shared disk may show them different things
        state = self.from_main(lambda: latest_state(self.folder / "state"))
        if state is None:
            return None
        with fail_together(self.accelerator):
            tree = load_state(state)
        self.skipped.update(tree["skipped"])
        self.say(f"resuming from {state}")
        return tree

    def finish(self, result: dict[str, Any]) -> Path:
        """Write `result.json`, which marks the run as complete; return the run's folder."""
        if self.is_main:
            write_json(self.folder / "result.json", result)
        self.accelerator.wait_for_everyone()
        return self.folder

    # ------------------------------------------------------------------------------ stopping
    def stop_asked(self) -> bool:
        """Whether any process got Ctrl-C or SIGTERM; all processes agree on the step."""
        return self.any_rank(self._stop)

    def ask_to_stop(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Finish the step, save, leave. A second Ctrl-C leaves at once; launchers repeat SIGTERM,
        which must not end the saving that it asked for."""
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True

    # ------------------------------------------------------------------------------- talking
    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            console.print(text, markup=False)  # a path may hold [brackets]

    @contextmanager
    def progress(self, state: TrainingState) -> Iterator[Callable[[float, str], None]]:
        """Show a progress bar on the main process; yield show(images per second, note)."""
        bar = progress_bar()
        bar.disable = bar.disable or not self.is_main
        with bar:
            task = bar.add_task(
                "training", total=state.total_steps, completed=state.step, speed="", note=""
            )

            def show(speed: float, note: str) -> None:
                bar.update(task, completed=state.step, speed=f"{speed:.1f} images/s", note=note)

            yield show


@contextmanager
def start_run(
    kind: str,
    preset: str,
    recipe: Config,
    config: RunConfig,
    accumulate: int = 1,
    folder: Path | None = None,
) -> Iterator[Run]:
    """Find or make the run's folder, take its lock, listen to signals, and hand out the `Run`."""
    accelerator = make_accelerator(config.device, accumulate)
    with ExitStack() as held:

        def claim() -> Path:
            chosen = new_or_unfinished(kind, preset, recipe, folder)
            held.enter_context(lock(chosen))
            clear_leftovers(chosen)
            return chosen

        run = Run(from_main(accelerator, claim), config, accelerator)
        held.enter_context(_listening(run.ask_to_stop))
        torch.manual_seed(torch_seed(config.seed, "weights", 0))
        try:
            yield run
        except RuntimeError as error:  # a signal's handler raises it wherever the run just is
            if "DataLoader worker" not in str(error):
                raise
            raise LdmError(
                "a loader worker was killed, most often for want of memory: lower data.workers; "
                "the same command goes on from the last saved state"
            ) from error


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The module as a judge: in eval mode, its parameters without gradients, for a while."""
    training, wanted = module.training, [p.requires_grad for p in module.parameters()]
    module.eval().requires_grad_(False)
    try:
        yield module
    finally:
        module.train(training)
        for parameter, wants in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(wants)


@contextmanager
def _listening(stop: Callable[..., None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop; only the main thread can be asked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
