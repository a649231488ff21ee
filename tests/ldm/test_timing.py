import torch

from ldm.timing import describe_machine, name_device, time_interleaved

CPU = torch.device("cpu")


def test_calls_alternate_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], iter([0, 100, 0, 200, 0, 1, 0, 4, 0, 3, 0, 6, 0, 2, 0, 5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert time_interleaved(calls, 3, CPU) == {"a": 2, "b": 5}
    assert order == list("abababab")


def test_the_machine_is_described_in_words():
    message = describe_machine(CPU, "float32")
    assert message["device"] == name_device(CPU) and message["precision"] == "float32"
    threads = torch.get_num_threads()
    assert message["device"].endswith(", 1 thread" if threads == 1 else f", {threads} threads")
    assert message["torch"] == torch.__version__
