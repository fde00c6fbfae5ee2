"""What a run tells: to people on a terminal and in a log, to programs in rows and events."""

import contextlib
import io
import json
import pty
import termios
import time

import pytest

from cnn_jax.runtime.report import Clock, MetricsLog, Progress, duration, plot_curves, read_rows

ROW = {"epoch": 0.5, "train/loss": 1.25, "train/accuracy": 0.5, "images_per_second": 1234.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (60, "1:00"),
        (245, "4:05"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (100 * 3600, "100:00:00"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_clock_adds_up_the_parts_even_when_they_fail(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 14.5, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.measure("saving"):
        pass
    with pytest.raises(ZeroDivisionError), clock.measure("saving"):
        raise ZeroDivisionError
    assert clock.seconds == {"saving": 6.5}
    assert clock.seconds["waiting"] == 0
    assert clock.total() == 20.0


def write(directory, steps, *, resume_step=0):
    log = MetricsLog(directory, resume_step=resume_step)
    for step in steps:
        log.write(step, {"train/loss": step / 2})
    return log


def steps_in(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_rows_are_on_their_way_to_the_disk_at_once(tmp_path):
    log = write(tmp_path, [1, 2])
    assert steps_in(tmp_path) == [1, 2]
    assert log.rows == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 1.0}]
    assert log.at(2, "train/loss") == 1.0
    assert log.at(2, "test/loss") is None
    assert log.at(3, "train/loss") is None
    log.close()


def test_rows_behind_the_resume_step_are_dropped(tmp_path):
    write(tmp_path, [2, 4, 6]).close()
    log = write(tmp_path, [6], resume_step=4)
    assert steps_in(tmp_path) == [2, 4, 6]
    assert [row["step"] for row in log.rows] == [2, 4, 6]
    log.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "train/lo', '{"step": 3', "{", '{"a": "\udcff'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, [1, 2]).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, [3], resume_step=9).close()
    assert steps_in(tmp_path) == [1, 2, 3]


def test_without_a_file_there_are_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def progress_on_a_pipe(**options):
    stream = io.StringIO()
    return stream, Progress(10, first_step=options.get("first_step", 0), stream=stream)


def test_a_log_gets_plain_lines():
    stream, progress = progress_on_a_pipe()
    progress.advance(5)
    assert stream.getvalue() == ""
    progress.show(5, ROW)
    progress.say("epoch 1.00  test loss 1.0000")
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 5/10  epoch 0.50  loss 1.2500  accuracy 0.5000  1,234 images/s")
    assert first.endswith(" s left")
    assert second == "epoch 1.00  test loss 1.0000"
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_long_count_is_told_in_a_log_every_ten_seconds(monkeypatch):
    now = iter([100.0, 104.0, 110.0, 119.0, 120.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stream, progress = progress_on_a_pipe()
    for done in (1, 2, 3, 4):
        progress.count(done, "images")
    assert stream.getvalue().splitlines() == [
        "2 of 10 images, 0 a second, 40.0 s left",
        "4 of 10 images, 0 a second, 30.8 s left",
    ]


def test_time_left_counts_the_steps_of_this_start_only(monkeypatch):
    now = iter([100.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stream, progress = progress_on_a_pipe(first_step=6)
    progress.show(8, ROW)
    assert stream.getvalue().endswith("  4.0 s left\n")


def read_all(terminal):
    """Returns what was written on a terminal that its writer has closed."""
    parts = []
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as stream:
        while part := stream.read(4096):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        termios.tcsetwinsize(theirs, (24, 200))
        progress = Progress(10, first_step=2, stream=terminal)
        progress.advance(5)
        progress.show(5, ROW)
        progress.say("a line of its own")
        progress.advance(10)
        progress.close()
    written = read_all(ours)
    assert "100%|" in written
    assert "10/10 [" in written
    assert "left]" in written
    assert "epoch 0.50  loss 1.2500  accuracy 0.5000  1,234 images/s" in written
    assert "a line of its own\r\n" in written
    assert "step 5/10" not in written


@pytest.mark.parametrize("rows", [[], [{"step": 1, "epoch": 0.1, "train/loss": 1.0}]])
def test_curves_of_a_run_that_has_hardly_begun(tmp_path, rows):
    plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
