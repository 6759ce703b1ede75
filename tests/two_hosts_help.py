"""Two hosts that a test makes itself, with the right to: network namespaces with a cable between them."""
import os
import shutil
import subprocess

HOSTS = [f"tp{os.getpid()}{side}" for side in "ab"]
ADDRESSES = ["10.231.77.1", "10.231.77.2"]


def run(*command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True)


def make_hosts():
    """Why there are none; None: two hosts are there, and remove_hosts is to be called."""
    if not shutil.which("ip"):
        return "no ip here"
    try:
        for host in HOSTS:
            run("ip", "netns", "add", host)
        run("ip", "link", "add", "tpveth0", "netns", HOSTS[0], "type", "veth", "peer", "name", "tpveth0", "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES):
            run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "tpveth0")
            run("ip", "-n", host, "link", "set", "lo", "up")
        join()
    except (OSError, subprocess.CalledProcessError) as error:
        remove_hosts()
        return getattr(error, "stderr", None) or str(error)
    return None


def join():
    for host in HOSTS:
        run("ip", "-n", host, "link", "set", "tpveth0", "up")


def cut():
    run("ip", "-n", HOSTS[0], "link", "set", "tpveth0", "down")


def remove_hosts():
    for host in HOSTS:
        for pid in run("ip", "netns", "pids", host, check=False).stdout.split():
            try:
                os.kill(int(pid), 9)
            except ProcessLookupError:
                pass
        run("ip", "netns", "del", host, check=False)


def on_host(number):
    """What runs the command behind it on one of them, under the host's own name."""
    return ["ip", "netns", "exec", HOSTS[number], "unshare", "--uts", "sh", "-c", f'hostname {HOSTS[number]}; exec "$@"', "sh"]
