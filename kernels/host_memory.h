// What the kernel says of memory: of the machine, of the cgroup, of a process.
#ifndef TPSHARD_KERNELS_HOST_MEMORY_H
#define TPSHARD_KERNELS_HOST_MEMORY_H

// Bytes that may still be taken: what the kernel calls available, or what the cgroup leaves, whichever is less; -1: not known.
double host_memory_available(void);
// The first number behind `key` in a /proc or cgroup file, times `unit`; -1 when there is none ("max" too).
double host_memory_figure(const char *path, const char *key, double unit);

#endif
