// Entry points for Python return null, or what went wrong.
#pragma once

#include <stdexcept>
#include <string>

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
