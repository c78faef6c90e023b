// Calls launch() on a runtime that runs nothing; test_launches.py runs this program.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"
#include "launch.cuh"

using namespace snnlstm::cuda;

namespace {

void kernel(int) {}
void other(int) {}
void late(int) {}

void want(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

std::string error_of(size_t bytes, void (*which)(int) = kernel) {
  try {
    launch(Launch{"kernel", dim3(1), dim3(32), bytes}, which, 1);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace

int main() {
  want(error_of(300 * 1024).find("bytes of shared memory") != std::string::npos,
       "a launch above the device's limit says what it was");
  want(error_of(1024).empty(), "an error stays with the call that made it");
  want(error_of(300 * 1024).find("or a kernel that was launched before it") != std::string::npos,
       "an error may be an earlier kernel's");

  for (const int chosen : {1, 1, 0, 1}) {
    static_cast<void>(OnDevice(chosen));
    want(fake::device == chosen, "a call has its device, and afterwards no other one is chosen");
  }
  want(fake::choices == 3, "a device is chosen once");
  try {
    const OnDevice on(2);
    want(false, "there is no such device");
  } catch (const std::runtime_error& error) {
    want(fake::device == 1 && fake::last == cudaSuccess, "an absent device changes nothing");
    want(std::string(error.what()).find("launches.cpp:") != std::string::npos,
         "an error names the line that chooses the device");
  }

  fake::refuses_attributes = true;
  want(!error_of(100 * 1024, other).empty(), "a refused attribute is an error");
  fake::refuses_attributes = false;
  want(error_of(1024, other).empty(), "a refused attribute stays with its call");
  want(error_of(100 * 1024, other).empty(), "and is asked for again");

  const int before = fake::attribute_calls;
  std::vector<std::thread> threads;
  bool well[4] = {};
  for (int k = 0; k < 4; ++k)
    threads.emplace_back([&, k] {
      fake::device = k % 2;
      well[k] = true;
      for (int i = 0; i < 2000; ++i) well[k] &= error_of(size_t(50 + 40 * k) * 1024).empty();
    });
  for (std::thread& t : threads) t.join();
  for (const bool each : well) want(each, "threads with different needs do not disturb each other");
  want(fake::attribute_calls - before == 1, "once for each kernel and device");
  launch(Launch{"empty", dim3(0), dim3(32)}, kernel, 1);
  fake::capturing = true;
  want(error_of(1024, late).find("run the call once before") != std::string::npos,
       "a kernel's first launch within a capture says what to do");
  want(error_of(1024).empty(), "the next launch is captured");
  want(fake::launches == 2 + 1 + 8000 + 1, "every launch but the empty one came through");
}
