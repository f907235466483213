"""What else happened while something was measured: found by real neighbours, and told in a made /proc and /sys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from efficli.ops import disturbance
from efficli.ops.disturbance import Disturbance, Neighbour, Watch
from efficli.ops.process import cpu_seconds

TICKS = os.sysconf("SC_CLK_TCK")
OURS = sorted(os.sched_getaffinity(0))
BURN = (
    "import sys, time\nprint(flush=True)\nend = time.perf_counter() + {seconds}\nwhile time.perf_counter() < end: pass"
)

QUIET = Disturbance(
    seconds=10.0,
    windows=5,
    cores=4,
    own_cores=4.0,
    others_cores=0.02,
    waited_share=0.01,
    steal_share=0.001,
    frequency_drop=0.01,
    throttled=0,
    board=(),
    load1=4.0,
    top=(),
    seen_cores=0.0,
)


@contextmanager
def burning(*, cpu: int | None = None, seconds: float = 60.0):
    """A process that uses all of a CPU that it can get; it has begun to."""
    pin = f"import os; os.sched_setaffinity(0, {{{cpu}}})\n" if cpu is not None else ""
    with subprocess.Popen([sys.executable, "-c", pin + BURN.format(seconds=seconds)], stdout=-1) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def burn_until(used: float, pids) -> None:
    """Wait until each of the processes has used so much more CPU time, however busy the machine is."""
    before = {pid: cpu_seconds(pid) for pid in pids}
    while any(cpu_seconds(pid) - before[pid] < used for pid in pids):
        time.sleep(0.02)


def test_two_busy_loops_are_told_and_named(monkeypatch):
    monkeypatch.setattr(disturbance, "NAMED", 10_000)  # others may be busier on a machine that does more than test
    watch = Watch(list)
    with burning() as one, burning() as two:
        watch.start()
        burn_until(0.3, (one.pid, two.pid))
        found = watch.stop()
    used = {pid: cores for _, pid, cores in found.top}
    assert used[one.pid] * found.seconds >= 0.28 and used[two.pid] * found.seconds >= 0.28
    assert found.others_cores * found.seconds > 0.5
    line = found.lines[0]
    assert line.startswith("busy neighbour: other processes used ")
    assert f" of {len(OURS)} cores (" in line and ", load " in line
    assert f" pid {one.pid}: {used[one.pid]:.2f}" in line and f" pid {two.pid}: {used[two.pid]:.2f}" in line
    assert json.loads(json.dumps(found.to_json()))["lines"] == list(found.lines)


def test_the_busiest_three_are_named():
    watch = Watch(list)
    with burning() as one, burning() as two, burning() as three, burning() as four:
        watch.start()
        burn_until(0.1, (one.pid, two.pid, three.pid, four.pid))
        top = watch.stop().top
    assert len(top) == 3
    assert top == tuple(sorted(top, key=lambda neighbour: -neighbour.cores))


def test_what_is_ours_is_no_neighbour():
    with burning() as ours:
        watch = Watch(lambda: [ours.pid])
        before = cpu_seconds(ours.pid)
        watch.start()
        burn_until(0.3, [ours.pid])
        found = watch.stop()
        used = cpu_seconds(ours.pid) - before
    assert used * 0.8 <= found.own_cores * found.seconds <= used + 0.2
    assert ours.pid not in [pid for _, pid, _ in found.top]
    assert found.own_cores + found.others_cores <= found.cores * 1.02 + 0.05 / found.seconds


def test_others_use_at_least_what_each_of_them_says():
    watch = Watch(list)
    with burning() as one, burning() as two:
        watch.start()
        before = cpu_seconds(one.pid) + cpu_seconds(two.pid)
        burn_until(0.4, (one.pid, two.pid))
        used = cpu_seconds(one.pid) + cpu_seconds(two.pid) - before
        found = watch.stop()
    assert found.others_cores * found.seconds > used - 0.06


def test_a_process_of_ours_that_began_and_ended_in_the_window_is_ours():
    watch = Watch(list)
    watch.start()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    found = watch.stop()
    assert 0.3 <= found.own_cores * found.seconds < 0.6


def test_what_a_process_of_ours_used_before_the_window_does_not_count():
    pids = []
    watch = Watch(lambda: pids)
    with burning() as ours:
        pids.append(ours.pid)
        burn_until(0.5, pids)
        before = cpu_seconds(ours.pid)
        watch.start()
        burn_until(0.1, pids)
        used = cpu_seconds(ours.pid) - before
        ours.kill()
        ours.wait()
        found = watch.stop()
    assert used - 0.03 <= found.own_cores * found.seconds < used + 0.2


def test_windows_add_up_and_what_is_between_them_is_left_out():
    with burning() as ours:
        watch = Watch(lambda: [ours.pid])
        seconds, own = 0.0, 0.0
        for windows in (1, 2, 3):
            burn_until(0.1, [ours.pid])
            watch.start()
            began, before = time.monotonic(), cpu_seconds(ours.pid)
            burn_until(0.05, [ours.pid])
            own += cpu_seconds(ours.pid) - before
            seconds += time.monotonic() - began
            found = watch.stop()
            assert found.windows == windows
    assert found.seconds == pytest.approx(seconds, rel=0.2)
    assert found.own_cores * found.seconds == pytest.approx(own, abs=0.1)


def test_a_pause_ends_a_window_as_a_stop_does():
    watch = Watch(list)
    for _ in range(3):
        watch.start()
        watch.pause()
    watch.pause()
    found = watch.stop()
    assert found.windows == 3
    assert replace(watch.stop(), load1=None) == replace(found, load1=None)


def test_waiting_for_a_core_is_told():
    cpu = OURS[0]
    with burning(cpu=cpu) as ours, burning(cpu=cpu) as other:
        watch = Watch(lambda: [ours.pid])
        watch.start()
        burn_until(0.3, (ours.pid, other.pid))
        found = watch.stop()
    assert 0.35 < found.waited_share < 1
    assert f"waiting: our threads waited {found.waited_share:.0%} of their time for a core" in found.lines


def test_more_threads_than_cores_are_not_blamed_on_others():
    crowded = replace(QUIET, own_cores=3.98, waited_share=0.5)
    assert crowded.lines == (
        "waiting: our threads waited 50% of their time for a core, for each other: more threads than cores",
    )
    beside = replace(crowded, own_cores=2.0, others_cores=2.0, top=(Neighbour("cc1", 7, 2.0),))
    assert beside.lines[1] == "waiting: our threads waited 50% of their time for a core"


def test_a_quiet_machine_says_nothing():
    assert QUIET.lines == ()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"others_cores": 1.94, "top": (Neighbour("cc1", 12, 0.98), Neighbour("ld", 13, 0.5)),
             "seen_cores": 1.9},
            "busy neighbour: other processes used 1.9 of 4 cores (cc1 pid 12: 0.98, ld pid 13: 0.50), load 4.0",
        ),
        (
            {"others_cores": 0.125, "top": (Neighbour("a", 1, 0.05),), "load1": None},
            "busy neighbour: other processes used 0.12 of 4 cores (a pid 1: 0.05, most of it by processes that have"
            " ended or cannot be seen from here)",
        ),
        ({"waited_share": 0.31}, "waiting: our threads waited 31% of their time for a core, for each other: more "
         "threads than cores"),
        ({"steal_share": 0.06}, "steal time: the hypervisor took 6% of the cores' working time"),
        ({"frequency_drop": 0.12}, "frequency drop: the cores were 12% below the highest frequency seen"),
        (
            {"others_cores": 0.5, "seen_cores": 0.5},  # many that use little each
            "busy neighbour: other processes used 0.50 of 4 cores, load 4.0",
        ),
        ({"throttled": 1}, "CPU quota: the control group's limit stopped its processes in a period"),
        ({"throttled": 12}, "CPU quota: the control group's limit stopped its processes in 12 periods"),
        ({"board": ("throttled", "under-voltage")}, "board: the firmware reports throttled, under-voltage"),
    ],
)  # fmt: skip
def test_each_thing_beyond_its_threshold_is_a_sentence(change, line):
    assert replace(QUIET, **change).lines == (line,)


def test_what_others_may_use_grows_with_what_we_leave_idle():
    assert replace(QUIET, others_cores=0.06).busy
    assert not replace(QUIET, others_cores=0.3, cores=16, own_cores=8.0).busy
    assert replace(QUIET, others_cores=0.5, cores=16, own_cores=8.0).busy


def test_a_window_too_short_for_the_clock_of_proc_says_nothing():
    short = replace(QUIET, seconds=0.02, windows=1, others_cores=0.5, steal_share=0.1, waited_share=0.1)
    assert short.lines == ()
    assert len(replace(short, seconds=0.2).lines) == 3
    assert replace(short, seconds=0.2, windows=100).lines == ()


# A made /proc and /sys.


class Machine:
    """A tree as the kernel shows it, for the CPUs that the test may use and one that it may not."""

    def __init__(self, folder) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.write(self.proc / "loadavg", "0.52 0.58 0.59 1/467 12345\n")
        self.stat()

    @staticmethod
    def write(path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def stat(self, *, idle: int = 0, iowait: int = 0, steal: int = 0) -> None:
        """Ticks of each of our CPUs; the other one is idle all the time, and would hide a neighbour."""
        stranger = OURS[-1] + 1
        lines = ["cpu  1 2 3 4 5 6 7 8 0 0", f"cpu{stranger} 0 0 0 {9000 + idle * 99} 0 0 0 0 0 0"]
        lines += [f"cpu{cpu} 700 0 50 {1000 + idle} {50 + iowait} 3 4 {steal} 0 0" for cpu in OURS]
        self.write(self.proc / "stat", "\n".join([*lines, "intr 1 2 3", "ctxt 5"]) + "\n")

    def frequency(self, policy: int, now: int | str, top: int = 2_000_000, cpus: str | None = None) -> None:
        folder = self.sys / f"devices/system/cpu/cpufreq/policy{policy}"
        self.write(folder / "affected_cpus", (cpus or " ".join(map(str, OURS))) + "\n")
        self.write(folder / "cpuinfo_max_freq", f"{top}\n")
        self.write(folder / "scaling_cur_freq", f"{now}\n")

    def quota(self, group: str, count: int) -> None:
        folder = self.sys / "fs/cgroup" / group
        self.write(folder / "cgroup.procs", "")
        self.write(folder / "cpu.stat", f"usage_usec 77\nnr_periods 9\nnr_throttled {count}\nthrottled_usec 5\n")

    def watch(self) -> Watch:
        return Watch(lambda: [os.getpid()], proc=self.proc, sys=self.sys)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_others_are_what_is_neither_idle_nor_stolen_nor_ours(machine):
    watch = machine.watch()
    watch.start()
    time.sleep(0.25)
    machine.stat(idle=6, iowait=2, steal=3)
    found = watch.stop()
    cores, seconds = len(OURS), found.seconds
    worked = cores * (seconds - 8 / TICKS)
    assert found.own_cores + found.others_cores == pytest.approx((worked - cores * 3 / TICKS) / seconds)
    assert found.steal_share == pytest.approx(cores * 3 / TICKS / worked)
    assert found.load1 == 0.52
    assert any(line.startswith("steal time: the hypervisor took ") for line in found.lines)


def test_the_frequency_is_measured_against_the_highest_one_seen(machine):
    machine.frequency(0, 1_000_000)
    machine.frequency(4, 600_000, top=1_200_000)
    machine.frequency(9, 3_000_000, top=3_000_000, cpus=str(OURS[-1] + 1))  # not ours
    watch = machine.watch()
    lengths = []
    # the nearest to its own maximum counts: an idle one is slow for want of work
    for big, little in ((1_900_000, 300_000), (500_000, 570_000), (950_000, 100_000)):
        machine.frequency(0, big)
        machine.frequency(4, little, top=1_200_000)
        watch.start()
        time.sleep(0.05)
        found = watch.stop()
        lengths.append(found.seconds - sum(lengths))
    halved = (lengths[1] + lengths[2]) / sum(lengths) * 0.5
    assert found.frequency_drop == pytest.approx(halved)
    assert f"frequency drop: the cores were {halved:.0%} below the highest frequency seen" in found.lines


def test_a_machine_that_does_not_tell_its_frequency(machine):
    machine.frequency(0, "<unknown>")
    watch = machine.watch()
    watch.start()
    assert watch.stop().frequency_drop is None


@pytest.mark.parametrize(
    ("own", "groups"),
    [
        ("0::/box/job\n", {"": None, "box": 3, "box/job": 5}),
        ("0::/\n", {"": 5}),
        ("4:memory:/x\n3:cpu,cpuacct:/box\n0::/\n", {"cpu,cpuacct": 4, "cpu,cpuacct/box": 4, "unified": None}),
        ("3:cpuset:/\n1:cpu:/\n", {"cpu": 1}),
        # version 1 in a container: its own group is mounted as the root, under the path of the host's
        ("2:cpu,cpuacct:/docker/abc\n", {"cpu": 2}),
    ],
)  # fmt: skip
def test_a_quota_of_our_group_or_of_one_around_it_is_told(machine, own, groups):
    machine.write(machine.proc / "self/cgroup", own)
    for group, count in groups.items():
        if count is None:
            machine.write(machine.sys / "fs/cgroup" / group / "cgroup.procs", "")
        else:
            machine.quota(group, count)
    watch = machine.watch()
    watch.start()
    raised = [group for group, count in groups.items() if count is not None]
    for group in raised:
        machine.quota(group, groups[group] + 4)
    found = watch.stop()
    assert found.throttled == 4 * len(raised)
    assert f"CPU quota: the control group's limit stopped its processes in {4 * len(raised)} periods" in found.lines


def test_no_quota_is_not_known(machine):
    machine.write(machine.proc / "self/cgroup", "0::/\n")
    watch = machine.watch()
    watch.start()
    assert watch.stop().throttled is None


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("0", "0", ()),
        ("50000", "50000", ()),  # since the board was started, and before us
        ("50000", "50005", ("throttled", "under-voltage")),
        ("0", "20000", ("frequency capped",)),
        ("0", "80008", ("soft temperature limit",)),
    ],
)
def test_what_a_raspberry_pi_reports(machine, before, after, told):
    file = machine.sys / "devices/platform/soc/soc:firmware/get_throttled"
    machine.write(file, before + "\n")
    watch = machine.watch()
    watch.start()
    machine.write(file, after + "\n")
    watch.pause()
    machine.write(file, before + "\n")
    assert watch.stop().board == told


@pytest.mark.parametrize("broken", ["no file", "a CPU is missing"])
def test_a_system_that_tells_nothing(machine, broken):
    (machine.proc / "loadavg").unlink()
    (machine.proc / "stat").unlink()
    if broken != "no file":
        machine.write(machine.proc / "stat", f"cpu 1 2 3 4 5 6 7 8\ncpu{OURS[-1] + 1} 1 2 3 4 5 6 7 8\n")
    watch = machine.watch()
    watch.start()
    found = watch.stop()
    assert (found.others_cores, found.own_cores, found.steal_share, found.load1) == (None,) * 4
    assert found.frequency_drop is None and found.throttled is None
    assert not any(line.startswith(("busy", "steal", "frequency", "CPU", "board")) for line in found.lines)
    json.dumps(found.to_json())


def test_before_any_window_there_is_nothing_to_tell():
    found = Watch(list).stop()
    assert (found.seconds, found.windows, found.others_cores, found.lines) == (0, 0, None, ())
