#!/usr/bin/env python3
"""What PyTorch reaches on this GPU, in the result lines of bench/gpu: copying, f16 and fp8 products, and a f16 matrix times few rows.

Needs: torch with CUDA. `make gpu-check` runs it in the same run as our own benchmarks.
"""
import sys

try:
    import torch
except ImportError:
    print("# torch is not here")
    sys.exit(0)

RUNS, REPEATS = 11, 20


def comment(what, problem):
    print(f"# {what}: {(str(problem).splitlines() or ['failed'])[0]}", flush=True)


def median_us(work, repeats=REPEATS):
    """Microseconds of one call, from a CUDA graph of `repeats` calls."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times = []
    for run in range(-3, RUNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if run >= 0:
            times.append(1000 * begin.elapsed_time(end) / repeats)
    return sorted(times)[RUNS // 2]


def scaled_products(gpu):
    """fp8 through torch._scaled_mm, an interface that changes from version to version."""
    n = 8192
    a = torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn).T
    for name, shapes in (("tensor", ((), ())), ("outer", ((n, 1), (1, n)))):
        try:
            scales = [torch.ones(shape, device="cuda") for shape in shapes]
            us = median_us(lambda: torch._scaled_mm(a, b, scale_a=scales[0], scale_b=scales[1],
                                                    out_dtype=torch.bfloat16), 4)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as problem:
            comment(f"torch_scaled_mm scale={name}", problem)
            continue
        print(f"torch_scaled_mm scale={name} rows={n} cols={n} tokens={n} us={us:.1f} tflops={2e-6 * n ** 3 / us:.1f} "
              f"gpu={gpu}", flush=True)


def main():
    try:
        gpu = torch.cuda.get_device_name(0).replace(" ", "-")
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as problem:  # no driver, one too old, or torch without CUDA
        comment("torch has no device", problem)
        return
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = median_us(lambda: target.copy_(source), 4)
    copy_gb_s = 2e-3 * source.numel() / us
    print(f"torch_copy us={us:.1f} gb_s={copy_gb_s:.0f} gpu={gpu}", flush=True)
    del source, target
    for rows, cols in [(4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192)]:
        copies = max(2, (256 << 20) // (rows * cols * 2) + 1)
        weights = [torch.randn(rows, cols, dtype=torch.float16, device="cuda") / 64 for _ in range(copies)]
        for tokens in (1, 16, 64, 1024, 4096):
            x = torch.randn(tokens, cols, dtype=torch.float16, device="cuda")
            turn = [0]

            def product():
                turn[0] = (turn[0] + 1) % copies
                return x @ weights[turn[0]].T

            us = median_us(product, 20 if tokens < 1024 else 4)
            gb_s = 2e-3 * rows * cols / us
            print(f"torch_linear kind=f16 rows={rows} cols={cols} tokens={tokens} us={us:.2f} gb_s={gb_s:.0f} "
                  f"copy_share={gb_s / copy_gb_s:.3f} tflops={2e-6 * tokens * rows * cols / us:.1f} gpu={gpu}", flush=True)
        del weights
    if torch.cuda.get_device_capability(0) >= (9, 0):
        scaled_products(gpu)


if __name__ == "__main__":
    main()
