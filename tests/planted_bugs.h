// planted_bugs.h: does cuda_on_cpu.h catch what it says it catches? Small kernels, each with one bug, run in a process of
// their own that must end badly or compute the wrong thing; and the same kernel without the bug, which must not.
// Part of test_cuda.cpp, on the CPU only.

#ifndef __CUDACC__

// How a child process ended that runs f: true if it returned true, false if it returned false, crashed or was stopped.
template <class F> static bool survives(F f) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(2);
        _exit(f() ? 0 : 1);
    }
    int status = 1;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

template <int BUG> __global__ void reverse_kernel(int *x) {                // 1: no barrier between writing and reading
    DYNAMIC_SHARED(shared);
    int *s = (int *)shared;
    s[threadIdx.x] = x[threadIdx.x];
    if (!BUG) __syncthreads();
    x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
template <int BUG> __global__ void twice_kernel(int *x) {                  // 1: shared memory written again while others read it
    DYNAMIC_SHARED(shared);
    int *s = (int *)shared;
    for (int i = 0; i < 4; i++) {
        if (!BUG) __syncthreads();
        s[threadIdx.x] = i * 1000 + threadIdx.x;
        __syncthreads();
        x[threadIdx.x] += s[(threadIdx.x + 33) % blockDim.x];
    }
}
template <int BUG> __global__ void neighbour_kernel(int *x) {              // 1: lanes of a warp are not in step by themselves
    DYNAMIC_SHARED(shared);
    int *s = (int *)shared;
    s[threadIdx.x] = x[threadIdx.x];
    if (!BUG) __syncwarp();
    x[threadIdx.x] = s[threadIdx.x ^ 31];
}
template <int BUG> __global__ void branch_kernel(int *x) {                 // 1: half a block at a barrier; 2: half a warp at a shuffle
    if (threadIdx.x < 16) x[threadIdx.x]++;
    if (BUG != 1 || threadIdx.x < 16) __syncthreads();
    if (BUG != 2 || threadIdx.x % 32 < 16) x[threadIdx.x] += __shfl_xor_sync(0xffffffffu, 1, 1);
}
template <int BUG> __global__ void bounds_kernel(float *x, int n) {        // 1: one load past the end; 2: a store; 3: shared memory
    DYNAMIC_SHARED(shared);
    float *s = (float *)shared;
    s[threadIdx.x + (BUG == 3)] = __uint_as_float(load16(x + threadIdx.x * 4 + (BUG == 1 ? 4 : 0)).x);
    __syncthreads();
    x[threadIdx.x * 4 + (BUG == 2 ? n - 3 : 0)] = s[threadIdx.x];
}
template <int BUG> __global__ void aligned_kernel(float *x) {              // 1: a load, 2: a cp.async, 3: an ldmatrix, each 4 bytes off
    DYNAMIC_SHARED(shared);
    uint32_t r[4];
    uint4 v = load16(x + (BUG == 1) + threadIdx.x % 2 * 4);
    cp_async16(shared + threadIdx.x % 32 * 16, x + (BUG == 2), 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    ldmatrix(r, shared + threadIdx.x % 16 * 16 + (BUG == 3) * 4);
    x[threadIdx.x] = (float)(v.x + r[0]);
}
template <int BUG> __global__ void copy_kernel(int *x) {                   // 1: waits for all but the last group; 2: not at all
    DYNAMIC_SHARED(shared);
    int *s = (int *)shared;
    cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4, 16);
    cp_async_commit();
    if (BUG == 0) cp_async_wait<0>();
    if (BUG == 1) cp_async_wait<1>();
    __syncthreads();
    int next = (threadIdx.x + 1) % blockDim.x;
    for (int i = 0; i < 4; i++) x[threadIdx.x * 4 + i] = s[next * 4 + i];
}
template <int BUG> __global__ void start_kernel(float *x) {                // 1: counts on shared memory that is zero at the start
    DYNAMIC_SHARED(shared);
    float *s = (float *)shared;
    if (!BUG) s[threadIdx.x] = 0.0f;
    s[threadIdx.x] += 1.0f;
    x[threadIdx.x] = s[threadIdx.x];
}

typedef struct { float *to; const float *from; int n; } Pointers;
template <int BUG> __global__ void pointers_kernel(Pointers p, const float *from) { p.to[threadIdx.x] = p.from[threadIdx.x] + from[threadIdx.x]; }

enum { BUG_THREADS = 64 };
static Ints bug_ints(int n) { Ints v(n); for (int i = 0; i < n; i++) v[i] = i; return v; }
template <int BUG> static bool run_reverse() {
    Device<int> x(bug_ints(BUG_THREADS));
    LAUNCH(reverse_kernel<BUG>, 1, BUG_THREADS, BUG_THREADS * 4, x.p);
    Ints got = x.host();
    for (int i = 0; i < BUG_THREADS; i++) if (got[i] != BUG_THREADS - 1 - i) return false;
    return true;
}
template <int BUG> static bool run_twice() {
    Device<int> x(BUG_THREADS);
    LAUNCH(twice_kernel<BUG>, 1, BUG_THREADS, BUG_THREADS * 4, x.p);
    Ints got = x.host();
    for (int i = 0; i < BUG_THREADS; i++) if (got[i] != 6000 + 4 * ((i + 33) % BUG_THREADS)) return false;
    return true;
}
template <int BUG> static bool run_neighbour() {
    Device<int> x(bug_ints(BUG_THREADS));
    LAUNCH(neighbour_kernel<BUG>, 1, BUG_THREADS, BUG_THREADS * 4, x.p);
    Ints got = x.host();
    for (int i = 0; i < BUG_THREADS; i++) if (got[i] != (i ^ 31)) return false;
    return true;
}
template <int BUG> static bool run_branch() { Device<int> x(BUG_THREADS); LAUNCH(branch_kernel<BUG>, 1, BUG_THREADS, 0, x.p); return true; }
template <int BUG> static bool run_bounds() {
    Device<float> x(BUG_THREADS * 4);
    LAUNCH(bounds_kernel<BUG>, 1, BUG_THREADS, BUG_THREADS * 4, x.p, BUG_THREADS * 4);
    return true;
}
template <int BUG> static bool run_aligned() { Device<float> x(BUG_THREADS); LAUNCH(aligned_kernel<BUG>, 1, BUG_THREADS, 1024, x.p); return true; }
template <int BUG> static bool run_copy() {
    Device<int> x(bug_ints(BUG_THREADS * 4));
    LAUNCH(copy_kernel<BUG>, 1, BUG_THREADS, BUG_THREADS * 16, x.p);
    Ints got = x.host();
    for (int i = 0; i < BUG_THREADS * 4; i++) if (got[i] != (i + 4) % (BUG_THREADS * 4)) return false;
    return true;
}
template <int BUG> static bool run_start() {
    Device<float> x(BUG_THREADS);
    LAUNCH(start_kernel<BUG>, 1, BUG_THREADS, BUG_THREADS * 4, x.p);
    for (float v : x.host()) if (v != 1.0f) return false;
    return true;
}

static float on_the_host[BUG_THREADS];
template <int BUG> static bool run_pointers() {                            // 1, 2: the host's memory as an argument, in a struct
    Device<float> x(BUG_THREADS), y(BUG_THREADS);
    Pointers p = { x.p, BUG == 2 ? on_the_host : y.p, 1 };
    LAUNCH(pointers_kernel<BUG>, 1, BUG_THREADS, 0, p, BUG == 1 ? on_the_host : (const float *)y.p);
    return true;
}
template <int BUG> static bool run_host() {                                // 1, 2: the host reads, writes; 3, 4: a copy to, from the wrong side
    Device<float> x(BUG_THREADS);
    float here = 0, *p = x.p, *to = BUG == 3 ? p + 1 : &here;
    if (BUG == 1) here = *(volatile float *)p;
    if (BUG == 2) *(volatile float *)p = 1;
    K->get(to, BUG == 4 ? on_the_host : p, sizeof here);
    return true;
}
template <int BUG> static bool run_freed() {                               // 1: a graph is replayed whose memory is gone
    float *x = (float *)K->alloc(BUG_THREADS * 4), *y = (float *)K->alloc(BUG_THREADS * 4);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamBeginCapture(nullptr, 0);
    LAUNCH(pointers_kernel<BUG>, 1, BUG_THREADS, 0, Pointers{ x, y, 1 }, y);
    cudaStreamEndCapture(nullptr, &graph);
    cudaGraphInstantiateWithFlags(&exec, graph, 0);
    if (BUG) K->release(y);
    cudaGraphLaunch(exec, nullptr);
    if (!BUG) K->release(y);
    K->release(x);
    return true;
}

template <int BUG> __global__ void large_kernel(int *x) {                  // 1: 64 KiB of shared memory not asked for; 2: less asked for than used; 3: a grid that is too high
    DYNAMIC_SHARED(shared);
    shared[threadIdx.x] = 0;
    if (blockIdx.y == 0) x[threadIdx.x] = 1;
}
template <int BUG> static bool run_large() {
    Device<int> x(32);
    if (BUG != 1) CHECK(cudaFuncSetAttribute(large_kernel<BUG>, cudaFuncAttributeMaxDynamicSharedMemorySize, BUG == 2 ? 60 << 10 : 64 << 10));
    LAUNCH(large_kernel<BUG>, dim3(1, BUG == 3 ? 65536 : 2), 32, 64 << 10, x.p);
    return x.host()[0] == 1;
}
template <int BUG> static bool run_stream() {                              // 1: read before the stream was waited for; 2: pinned memory written again
    Device<int> x(1);
    int *pinned, got = 0, want = 0;
    if (cudaHostAlloc((void **)&pinned, 4, cudaHostAllocDefault)) return true;
    for (int i = 0; i < 30; i++) {                                         // whether a copy is done at once or later is random
        *pinned = i;
        CHECK(cudaMemcpyAsync(x.p, pinned, 4, cudaMemcpyHostToDevice, stream));
        if (BUG == 2) *pinned = -1;
        CHECK(cudaMemcpyAsync(&got, x.p, 4, cudaMemcpyDeviceToHost, stream));
        if (BUG != 1) CHECK(cudaStreamSynchronize(stream));
        if (got != i) want = 1;
        CHECK(cudaStreamSynchronize(stream));
    }
    return !want;
}
template <int BUG> static bool run_capture() {                             // 1: a copy from the host, 2: waiting, 3: freeing, inside a recording
    Device<int> x(32), y(32);
    cudaGraph_t graph;
    int here[32] = {};
    void *other;
    CHECK(cudaMalloc(&other, 4));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    CHECK(cudaMemcpyAsync(y.p, x.p, sizeof here, cudaMemcpyDeviceToDevice, stream));
    if (BUG == 1) CHECK(cudaMemcpyAsync(x.p, here, sizeof here, cudaMemcpyHostToDevice, stream));
    if (BUG == 2) CHECK(cudaStreamSynchronize(stream));
    if (BUG == 3) CHECK(cudaFree(other));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaFree(other));
    return true;
}

static void test_planted_bugs() {
    #define CAUGHT(run, bug) check(!survives(run<bug>), "%s<%d>: the bug was not caught", #run, bug)
    #define FINE(run) check(survives(run<0>), "%s<0>: is right, but was stopped", #run)
    FINE(run_reverse); FINE(run_twice); FINE(run_neighbour); FINE(run_branch); FINE(run_bounds); FINE(run_aligned); FINE(run_copy); FINE(run_start);
    FINE(run_pointers); FINE(run_host); FINE(run_freed); FINE(run_large); FINE(run_stream); FINE(run_capture);
    CAUGHT(run_reverse, 1); CAUGHT(run_twice, 1); CAUGHT(run_neighbour, 1); CAUGHT(run_branch, 1); CAUGHT(run_branch, 2);
    CAUGHT(run_bounds, 1); CAUGHT(run_bounds, 2); CAUGHT(run_bounds, 3);
    CAUGHT(run_aligned, 1); CAUGHT(run_aligned, 2); CAUGHT(run_aligned, 3);
    CAUGHT(run_copy, 1); CAUGHT(run_copy, 2); CAUGHT(run_start, 1);
    CAUGHT(run_pointers, 1); CAUGHT(run_pointers, 2); CAUGHT(run_freed, 1);
    CAUGHT(run_large, 1); CAUGHT(run_large, 2); CAUGHT(run_large, 3); CAUGHT(run_stream, 1); CAUGHT(run_stream, 2);
    CAUGHT(run_capture, 1); CAUGHT(run_capture, 2); CAUGHT(run_capture, 3);
    CAUGHT(run_host, 1); CAUGHT(run_host, 2); CAUGHT(run_host, 3); CAUGHT(run_host, 4);

    // the machine's errors: no device or too old a one is NULL; the others end the program, with a line that says why
    check(!survives([] { emu::free_bytes = emu::used_bytes + (1 << 20); K->alloc(2 << 20); return true; }), "an allocation larger than the memory succeeded");
    check(!survives([] {
        KV *kv = K->kv_new(1, 1, 16, 1, F32);
        K->kv_reserve(kv, 0, 1);
        Pass p({ 0, 0 }, { 0, 1 }, { 0, 1 }, 1);
        Device<float> qkv(2 * 48);
        K->kv_append(kv, 0, qkv, &p.rows, 1);
        return true;
    }), "kv_append beyond what was reserved succeeded");
    check(!survives([] { K->record(5); K->stop(); K->record(5); float x; Device<float> d(1); K->get(&x, d, 4); return true; }), "get inside a recording succeeded");
}

#endif
