"""What a measurement was made on, and when its work is really done."""

import platform
from datetime import date
from pathlib import Path

import torch


def describe_machine(device: torch.device, precision: str) -> dict[str, str]:
    """The device, its threads, the precision, the versions and the day, in words."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "device": where,
        "precision": precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (lines.read_text().splitlines() if lines.is_file() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
