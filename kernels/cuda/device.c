// What all files of the backend call. See device.h. Apart from its table, which brings every kernel with it.
#include "kernels/cuda/device.h"

int device_status(const struct device *d, cudaError_t status, const char *what, struct error *err)
{
    if (status == cudaSuccess)
        return 0;
    return error_set(err, status == cudaErrorMemoryAllocation ? ERR_MEMORY : ERR_GPU, "device %d: %s: %s (%s)",
                     d->index, what, cudaGetErrorString(status), cudaGetErrorName(status));
}

int device_upload(struct device *d, void *to, const void *from, uint64_t bytes, const char *what, struct error *err)
{
    int rc = CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), what);
    return rc ? rc : CHECK(cudaStreamSynchronize(NULL), what);
}
