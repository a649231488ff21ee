"""A training run: device, processes, safe steps, saved state, stopping.

Both training loops share this module; it does not know what they compute.
"""

import logging
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from ldm.checkpoint import ModelFile, repair_pair, save_model
from ldm.config import Config, to_tree
from ldm.console import HANGUP, STOPS, receive, received
from ldm.data.workers import stopping
from ldm.device import (
    HostCopy,
    cast_for_autocast,
    compile_in_place,
    deterministic_algorithms,
    memory_format,
    missing_compiler,
    peak_flops,
    resolve_precision,
    to_device,
    to_host,
    trace_steps,
)
from ldm.distributed import fail_together, from_main, make_accelerator
from ldm.errors import Interrupted, LdmError, listed
from ldm.files import BackgroundWriter, write_json
from ldm.logbook import Logbook, ShowRow, console, show_training
from ldm.run_folder import (
    TrainingState,
    check_state,
    latest_state,
    load_state,
    new_or_unfinished,
    save_state,
)
from ldm.seeds import torch_seed
from ldm.trackers import TrackerName, check_trackers

T = TypeVar("T")
CountFlops = Callable[[Any, Any], Mapping[Any, float]]
"""Counts `Run.flops` of a recipe and the config of its autoencoder, if that is given."""

MAX_BAD_STEPS = 10
log = logging.getLogger("ldm")


class RunConfig(Config):
    """Settings of a run, apart from what it computes."""

    seed: int = 0
    """Seed of all randomness: initial weights, order, crops, noise."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, or cuda:1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: networks under autocast, losses in float32. auto: bf16 if the device supports it."""
    log_every_steps: PositiveInt = 50
    """Steps between rows of metrics.jsonl."""
    validate_every_steps: PositiveInt = 1000
    """Steps between validations, on held-out images or samples (numbers and a picture)."""
    save_every_steps: PositiveInt = 1000
    """Steps between saved states; a stop by Ctrl-C, SIGTERM or SIGHUP saves as well."""
    keep_states: PositiveInt = 2
    """Number of saved states to keep, the newest."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get numbers and pictures, besides the run's folder: [tensorboard, wandb], or
    any that accelerate knows; [] for none."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile the networks: the first steps are slow. auto: on a CUDA GPU, where there are
    Triton and the compilers that it needs, unless `deterministic`."""
    deterministic: bool = False
    """Compute by deterministic algorithms only, on a GPU too: slower; on a CPU all of them are."""
    profile: str = ""
    """START:STOP: trace the steps after step START, up to step STOP, with torch.profiler, into
    profile.json.gz."""

    @field_validator("profile")
    @classmethod
    def _is_a_window(cls, window: str) -> str:
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", window)
        if window and not (found and int(found[1]) < int(found[2])):
            raise ValueError("must be START:STOP, two counts of steps, the lower first")
        return window

    def check_profile(self, steps: int) -> None:
        """Raise a ValueError for a window that ends after the last step."""
        if self.profile and int(self.profile.partition(":")[2]) > steps:
            raise ValueError(f"run.profile: {self.profile} ends after the last step, {steps}")

    def compiles(self, device: torch.device) -> bool:
        """Resolve `compile` on a device."""
        if self.compile == "auto":
            can = device.type == "cuda" and missing_compiler(device) is None
            return can and not self.deterministic
        return self.compile


class Run:
    """One process of a run: device, ranks, steps, saving, stopping. Made by `start_run`.

    Attributes:
        name_image: the name of the run's k-th image.
        writer: writes the run's large files beside training, in the order of their submission.
        flops: operations of training on one image, by kinds of steps that `begin` is given.
    """

    def __init__(self, folder: Path, config: RunConfig, accelerator: Accelerator) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.device, self.seed = accelerator.device, config.seed
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.precision = resolve_precision(config.precision, self.device)
        self._skipped: Counter[str] = Counter()
        self._bad_in_a_row: Counter[str] = Counter()
        self.name_image: Callable[[int], str] = "image {}".format
        self._first = 0  # image of the micro-batch
        self._losses: dict[str, list[Tensor]] = {}
        self._each: dict[str, list[tuple[int, Tensor]]] = {}
        self._flags: dict[str, tuple[HostCopy, Callable[[int], str], list[int]]] = {}
        self._stop = self._all_stop = False
        self.writer = BackgroundWriter(on_failure=self.request_stop)
        self._saved: threading.Thread | None = None  # of the last save
        self.flops: Mapping[Any, float] = {}
        self._flops, self._waited = 0.0, 0.0
        self._peak = peak_flops(self.device, self.precision)

    # ------------------------------------------------------------------------------ stepping
    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it, so that processes average its gradients."""
        return self.accelerator.prepare_model(module)

    def compile(self, *parts: nn.Module | Callable[..., Any]) -> None:
        """Compile modules and methods in place if the config says so; names in their state stay.

        Each has a graph for every shape, and for every set of tensors that need gradients.
        """
        if self.config.compiles(self.device):
            compile_in_place(parts)

    def place(self, tensor_or_module: Any) -> Any:
        """Move images or a module to the device, in its fastest memory layout."""
        layout = memory_format(self.device)
        if isinstance(tensor_or_module, Tensor):
            return to_device(tensor_or_module, self.device).contiguous(memory_format=layout)
        return tensor_or_module.to(self.device, memory_format=layout)

    def place_frozen(self, module: nn.Module) -> Any:
        """Move a frozen module to the device; for bf16 a copy, see `cast_for_autocast`."""
        return self.place(cast_for_autocast(module) if self.precision == "bf16" else module)

    def autocast(self) -> AbstractContextManager:
        """Return the context in which networks run: autocast for bf16."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def begin(self, image: int, kind: object = None) -> None:
        """Begin a micro-batch of a kind by its first image: seed torch's own generators by (seed,
        image), so that no state has to be saved."""
        self._first, self._flops = image, self.flops.get(kind, 0.0)
        torch.manual_seed(torch_seed(self.seed, f"dropout {self.rank}", image))

    def step(
        self,
        loss: Tensor,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        name: str,
        clip_norm: float | None,
        each: Tensor | None = None,
    ) -> Tensor | None:
        """Run backward; at the end of a batch clip, update, and return the gradient norm.

        A step with a non-finite loss or gradient is skipped and counted under `name`. The tenth in
        a row ends the run; weights and saved states are still good. The device skips it, and this
        process learns of it in the next step: it never waits for the step that it has just begun.

        Args:
            optimizer: a fused one, which reads `found_inf` on the device as under a GradScaler.
            each: a number of each image (b,); of a skipped step, those not finite are named.

        Raises:
            LdmError: the ten steps before this one were skipped.
        """
        self.accelerator.backward(loss)
        losses = self._losses.setdefault(name, [])
        losses.append(loss.detach())
        images = self._each.setdefault(name, [])
        images += [] if each is None else [(self._first, each)]
        if not self.accelerator.sync_gradients:
            return None
        limit = float("inf") if clip_norm is None else clip_norm
        norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
        # the losses too: an infinite one can have finite gradients
        bad = torch.isfinite(torch.stack([norm, *losses])).all().logical_not().float()
        losses.clear()
        stop = torch.full_like(bad, self._stop)
        flags = self.sum(torch.stack([bad, stop])).clamp(max=1)  # of any process
        cast(Any, optimizer).found_inf = flags[0]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._read_flags(name)
        finite = torch.cat([flags, *(values.isfinite().float() for _, values in images)])
        ks = [k for first, values in images for k in range(first, first + len(values))]
        images.clear()
        self._flags[name] = HostCopy(finite), self.name_image, ks
        return norm

    def _read_flags(self, name: str) -> None:
        """Read the flags of the last step under `name`: skipped, and asked to stop."""
        if name not in self._flags:
            return
        copy, name_image, ks = self._flags.pop(name)
        skipped, stop, *finite = copy.values()
        self._all_stop = self._all_stop or stop > 0
        if not skipped:
            self._bad_in_a_row[name] = 0
            return
        self._skipped[name] += 1
        self._bad_in_a_row[name] += 1
        images = listed([name_image(k) for k, good in zip(ks, finite, strict=True) if not good])
        if images:
            log.warning("skipped a step of the %s: not finite for %s", name, images)
        if self._bad_in_a_row[name] == MAX_BAD_STEPS:
            with fail_together(self.accelerator):
                self.writer.join()
            last = latest_state(self.folder / "state")
            raise LdmError(
                f"{name}: loss or gradient not finite in {MAX_BAD_STEPS} steps in a row"
                f"{images and ', the last for '}{images}; stopped. Last good state: "
                f"{last or 'none yet'}. Resuming would repeat it: "
                "start a new run with a lower lr or run.precision=fp32"
            )

    @property
    def skipped(self) -> Counter[str]:
        """Steps skipped so far, by name; reading it waits for the last step."""
        for name in list(self._flags):
            self._read_flags(name)
        return self._skipped

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes, on all of them."""
        return self.accelerator.reduce(tensor, "mean") if self.world > 1 else tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, on all of them."""
        return self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor

    # -------------------------------------------------------------------------------- saving
    def save(self, tree: dict[str, Any], model: ModelFile) -> None:
        """Wait for the previous save; copy the model and the state to resume from; the main process
        writes them beside training, each atomically, the model first, so that a run whose last
        state is complete always has one."""
        tree = {**tree, "skipped": dict(self.skipped)}  # which raises on all processes or none
        with fail_together(self.accelerator):
            if self._saved is not None:
                self.writer.wait(self._saved)
            if self.is_main:
                self.write_model("ckpt.pt", model)
                saved = tree["images_seen"], to_host(tree), self.config.keep_states
                self._saved = self.writer.submit(partial(save_state, self.folder / "state", *saved))

    def write_model(self, name: str, model: ModelFile) -> None:
        """Copy a model's weights; the main process writes it beside training, atomically."""
        if self.is_main:
            model = replace(model, weights=to_host(model.weights))
            self.writer.submit(partial(save_model, self.folder / name, model))

    def settle(self) -> None:
        """Wait until the run's files are written; if one was not, raise its error on all."""
        with fail_together(self.accelerator):
            self.writer.wait()

    def resume(self) -> dict[str, Any] | None:
        """Load the newest saved state, the same on every process; None for a new run."""

        def find() -> Path | None:
            for name in ("ckpt.pt", "best.pt"):  # a kill may have come between a model's two files
                repair_pair(self.folder / name)
            return latest_state(self.folder / "state")

        # one process looks it up for all: a shared disk may show them different files
        state = from_main(self.accelerator, find)
        if state is None:
            return None
        with fail_together(self.accelerator):
            tree = load_state(state)
            check_state(state, tree)
        self.skipped.update(tree["skipped"])
        self.say(f"resuming from {state}")
        return tree

    def finish(self, result: dict[str, Any]) -> Path:
        """Write `result.json`, which marks the run as complete; return the run's folder."""
        self.settle()
        if self.is_main:
            write_json(self.folder / "result.json", result)
        self.accelerator.wait_for_everyone()
        return self.folder

    @contextmanager
    def logbook(self, state: TrainingState, recipe: Config) -> Iterator[Logbook]:
        """Open the logs of a run that resumes at a state, on the main process; fail together."""
        with fail_together(self.accelerator):
            start = self.folder if self.is_main else None, state.images_seen, state.log
            book = Logbook(*start, self.config.trackers, to_tree(recipe), self._usage)
        for line in book.opening:
            self.say(line)
        with book:
            yield book

    def waits(self, stream: Iterable[T]) -> Iterator[T]:
        """Yield from a stream of loaded data, and count the time that this process waits for it."""
        items = iter(stream)
        while True:
            began = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - began
            yield item

    def _usage(self, seconds: float, images: int) -> dict[str, float]:
        """Return shares of the time since the last row: this process waited for data; the devices
        would have needed for the model's operations at their peak (model FLOPs utilisation,
        Chowdhery et al. 2022, arXiv 2204.02311, Appendix B)."""
        shares, self._waited = {"data_wait": min(self._waited / seconds, 1.0)}, 0.0
        if self._peak and self._flops:
            shares["mfu"] = self._flops * images / (seconds * self._peak * self.world)
        return shares

    # ------------------------------------------------------------------------------ stopping
    def stop_requested(self) -> bool:
        """Return True if a signal asked any process to stop; all agree, and wait for each other."""
        if self.world == 1:  # without a wait for the device
            return self._stop
        return bool(self.sum(torch.tensor(float(self._stop), device=self.device)) > 0)

    def stop_after_step(self) -> bool:
        """`stop_requested` for a training loop, without a wait: several processes agree in `step`,
        and learn of it one step late."""
        return self._all_stop if self.world > 1 else self.stop_requested()

    def request_stop(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Stop after this step and save; only a third Ctrl-C stops at once, in a save too."""
        if receive(number):
            raise KeyboardInterrupt
        self._stop = True
        stopping.set()

    def interrupted(self, text: str) -> Interrupted:
        """Return the error of a stop that all processes agreed on, once all files are written; all
        exit by the same signal."""
        self.settle()
        if self.world > 1:
            number = torch.tensor([max(received, default=0)], device=self.device)
            received.insert(0, int(self.accelerator.gather(number).max()))
        return Interrupted(text)

    def until_stopped(
        self, state: TrainingState, stream: Iterable[T], save: Callable[[], None]
    ) -> Iterator[T]:
        """Yield from a stream of batches; save if a signal ends its wait for a loader worker.

        Several processes cannot agree on the step then: they resume from the last saved state. The
        main process traces the steps of `run.profile`.
        """
        if self.is_main and self.config.profile:
            trace = self.folder / "profile.json.gz"
            stream = trace_steps(stream, lambda: state.step, self.config.profile, trace, self.say)
        try:
            yield from stream
        except Interrupted as error:
            if self.world > 1 or not self.accelerator.sync_gradients:  # in the middle of a step
                raise
            save()
            raise self.interrupted(f"{error}, saved in {self.folder}") from None

    def _leave(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # a third Ctrl-C waits for nothing
            return
        try:
            self.writer.wait()
        except Exception as error:
            if kind is None or issubclass(kind, Interrupted):
                raise
            log.warning("%s", error)  # beside the error that ends the run

    # ------------------------------------------------------------------------------ printing
    def say(self, text: str) -> None:
        """Print a line on the main process."""
        if self.is_main:
            console.print(text, markup=False)  # a path may hold [brackets]

    def progress(self, state: TrainingState) -> AbstractContextManager[ShowRow]:
        """Show a progress bar on the main process, by its metrics."""
        return show_training(state.total_steps, lambda: state.step, self.is_main)


@contextmanager
def start_run(
    kind: str,
    preset: str,
    recipe: Config,
    config: RunConfig,
    accumulate: int = 1,
    folder: Path | None = None,
) -> Iterator[Run]:
    """Find or create the run's folder, lock it, handle signals, and yield the `Run`."""
    with ExitStack() as held:
        if config.deterministic:
            held.enter_context(deterministic_algorithms())
        accelerator = make_accelerator(config.device, accumulate)
        from_main(accelerator, partial(check_trackers, config.trackers))
        claim = partial(new_or_unfinished, kind, preset, recipe, folder, held)
        run = Run(from_main(accelerator, claim), config, accelerator)
        held.callback(stopping.clear)  # after the handlers, which set it, are gone
        received.clear()  # by an earlier run of this process
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            ignored = signal.getsignal(HANGUP) == signal.SIG_IGN  # as by nohup
            for number in STOPS - ({HANGUP} if ignored else set()):
                held.callback(signal.signal, number, signal.signal(number, run.request_stop))
        torch.manual_seed(torch_seed(config.seed, "weights", 0))
        held.push(run._leave)
        yield run
