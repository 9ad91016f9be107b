/* A driver whose device is this process's memory, for test_gpu_check.py: what is launched runs at once, what is
   captured runs once, a graph does nothing. Compiled with CUDA's own header where that is installed, so that the compiler
   compares the functions' types. */

#include <stdlib.h>
#include <string.h>

#if __has_include(<cuda.h>)
#include <cuda.h>
#undef cuEventElapsedTime /* since CUDA 12.8 a second version, which older drivers have not */
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr, cuuint64_t;
typedef void *CUcontext, *CUstream, *CUevent, *CUgraph, *CUgraphExec, *CUmodule, *CUfunction;
#endif

/* Tests set these. */
int fake_devices = 1;
float fake_elapsed_ms = 2;
int fake_live_allocations = 0;
int fake_graph_launches = 0;

static int handle;

CUresult cuInit(unsigned int flags) { return (CUresult)(flags == 0 ? 0 : 1); }
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == (CUresult)2 ? "out of memory" : "invalid argument";
  return (CUresult)0;
}
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return (CUresult)0;
}
CUresult cuDeviceGetCount(int* count) {
  *count = fake_devices;
  return (CUresult)0;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return (CUresult)0;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  (void)device;
  strncpy(name, "Fake GPU", size);
  return (CUresult)0;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = (int)attribute == 16 ? 132 : (int)attribute == 38 ? 1 << 16 : (int)attribute == 75 ? 9 : 0;
  return (CUresult)0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  (void)device;
  *context = (CUcontext)&handle;
  return (CUresult)0;
}
CUresult cuCtxSetCurrent(CUcontext context) { return (CUresult)(context == (CUcontext)&handle ? 0 : 1); }
CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
  *available = *total = 1 << 30;
  return (CUresult)0;
}
CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
  if (size == 0 || size > 1 << 30) return (CUresult)(size == 0 ? 1 : 2);
  *address = (CUdeviceptr)aligned_alloc(256, (size + 255) / 256 * 256);
  ++fake_live_allocations;
  return (CUresult)0;
}
CUresult cuMemFree_v2(CUdeviceptr address) {
  free((void*)address);
  --fake_live_allocations;
  return (CUresult)0;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
  memcpy((void*)to, from, size);
  return (CUresult)(stream == (CUstream)&handle ? 0 : 1);
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
  memcpy(to, (void*)from, size);
  return (CUresult)0;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  memmove((void*)to, (void*)from, size);
  return (CUresult)(stream == (CUstream)&handle ? 0 : 1);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
  memset((void*)to, value, size);
  return (CUresult)(stream == (CUstream)&handle ? 0 : 1);
}
CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
  *stream = (CUstream)&handle;
  return (CUresult)(flags == 1 ? 0 : 1);
}
CUresult cuStreamSynchronize(CUstream stream) { return (CUresult)(stream == (CUstream)&handle ? 0 : 1); }
CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  return (CUresult)(stream == (CUstream)&handle && (int)mode == 1 /* of this thread alone */ ? 0 : 1);
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  *graph = (CUgraph)&handle;
  return (CUresult)(stream == (CUstream)&handle ? 0 : 1);
}
CUresult cuEventCreate(CUevent* event, unsigned int flags) {
  *event = (CUevent)&handle;
  return (CUresult)(flags == 0 ? 0 : 1);
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  (void)stream;
  return (CUresult)(event == (CUevent)&handle ? 0 : 1);
}
CUresult cuEventSynchronize(CUevent event) { return (CUresult)(event == (CUevent)&handle ? 0 : 1); }
CUresult cuEventElapsedTime(float* ms, CUevent from, CUevent to) {
  *ms = fake_elapsed_ms;
  return (CUresult)(from == to ? 0 : 1);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags) {
  *executable = (CUgraphExec)&handle;
  return (CUresult)(graph == (CUgraph)&handle && flags == 0 ? 0 : 1);
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  ++fake_graph_launches;
  return (CUresult)(executable == (CUgraphExec)&handle && stream == (CUstream)&handle ? 0 : 1);
}
CUresult cuGraphDestroy(CUgraph graph) { return (CUresult)(graph == (CUgraph)&handle ? 0 : 1); }
CUresult cuGraphExecDestroy(CUgraphExec executable) { return (CUresult)(executable == (CUgraphExec)&handle ? 0 : 1); }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)&handle;
  return (CUresult)(strstr((const char*)image, ".entry empty()") ? 0 : 1);
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)&handle;
  return (CUresult)(module == (CUmodule)&handle && strcmp(name, "empty") == 0 ? 0 : 1);
}
CUresult cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                        unsigned int by, unsigned int bz, unsigned int shared, CUstream stream, void** arguments,
                        void** extra) {
  (void)arguments, (void)extra;
  return (CUresult)(gx * gy * gz == 1 && bx * by * bz == 32 && shared == 0 && function == (CUfunction)&handle &&
                            stream == (CUstream)&handle
                        ? 0
                        : 1);
}
