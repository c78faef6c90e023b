// Entry points for Python, which return null or an error's text, and small kernels by name.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

#include "kernels/primitives.cuh"
#include "launch.cuh"

#define ENTRY extern "C" __attribute__((visibility("default"))) const char*

template <class Body>
const char* guarded(Body&& body) {
  static std::string problem;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    problem = e.what();
    return problem.c_str();
  }
}

struct Data {
  const float* in;  // registered read-only
  float* out;       // registered writable
  int bad;          // 0: the innocent form of what the case must not do
};

struct Case {
  void (*kernel)(Data);
  int blocks, threads;
  size_t shared_bytes;
};
inline std::map<std::string, Case> cases;

// CASE(name) { body } is a kernel that Python runs by its name. The file has kThreads, the threads
// of a block, and the struct Shared. d: the kernel's Data.
#define CASES(name, blocks)                                                   \
  __global__ void name(Data d);                                               \
  const bool is_case_##name =                                                 \
      cases.insert({#name, {name, blocks, kThreads, sizeof(Shared)}}).second; \
  __global__ void name(Data d)
#define CASE(name) CASES(name, 1)
