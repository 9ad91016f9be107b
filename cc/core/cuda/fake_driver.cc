// An NVIDIA driver that only tells its version: for driver_test.cc, and to import a library with CUDA in front of it.

extern "C" int cuDriverGetVersion(int* version) {
  *version = 12080;
  return 0;
}
