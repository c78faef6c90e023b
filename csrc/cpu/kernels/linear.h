// Linear layers of an x of mostly zeros, such as spikes.
//
// A row of y sums the rows of the transposed weight at which the row of x is not zero. The gradient
// of the weight, transposed, sums in its row k the rows of grad_y at which column k of x is not
// zero. Zeros of x are never multiplied, so an infinite weight there gives no NaN.
//
// Outputs are taken in blocks of a few vectors, whose sums stay in registers. A block has its
// weights packed as (K, vectors), and its grad_y as (rows, vectors).
#pragma once

#include "sparse_list.h"
#include "threads.h"
#include "transpose.h"
#include "workspace.h"

SNNLSTM_BEGIN_ISA

class Linear {
  static constexpr int VL = kWideBytes / int(sizeof(float));
  using S = Simd<float, VL>;
  using R = S::R;

  // Blocks of nearly equally many vectors, of which the last one alone may have empty lanes.
  struct Blocks {
    int64_t outputs, vectors, count;

    Blocks(int64_t outputs_, int64_t most)
        : outputs(outputs_),
          vectors((outputs_ + VL - 1) / VL),
          count((vectors + most - 1) / most) {}
    int64_t first(int64_t block) const { return vectors * block / count * VL; }
    int64_t width(int64_t block) const { return first(block + 1) - first(block); }
    int64_t columns(int64_t block) const { return std::min(outputs - first(block), width(block)); }
  };

 public:
  // ---- the packed weight -------------------------------------------------------------------------

  static int64_t packed_bytes(int64_t K, int64_t Out) {
    return Blocks(Out, 1).vectors * VL * K * int64_t(sizeof(float));
  }

  static void pack(int64_t K, int64_t Out, int threads, const float* weight, float* packed) {
    const Blocks blocks(Out, kVectors);
    parallel_for(threads, blocks.count, blocks.width(0) * K, [&](int64_t block, int) {
      const int64_t first = blocks.first(block), width = blocks.width(block);
      load_row<S>(weight + first * K, K, 1, K, blocks.columns(block), packed + first * K,
                  Row{width}, width);
    });
  }

  // Returns the size in bytes of the workspace of a pass.
  static int64_t workspace(const LinearArgs& a, bool backward) {
    if (backward) return Gradient(a, nullptr).workspace.bytes();
    Workspace workspace(nullptr);
    RowLists(a, workspace, 0);
    return workspace.bytes();
  }

  // ---- the forward pass --------------------------------------------------------------------------

  // Returns the share of nonzeros in runs of neighbours, which are spread over rows and columns. A
  // few runs will do if 45 % of their values are not zero, which is far more than pays.
  static double look(const LinearArgs& a) {
    constexpr int64_t kRuns = 256, kFew = 32, kRun = 32;
    const int64_t size = a.M * a.K, length = std::min(kRun, a.K);
    const int64_t step = int64_t(0.6180339887 * double(size));  // the golden section spreads best
    int64_t nonzeros = 0, run = 0;
    for (int64_t place = 0; run < kRuns; place += step) {
      place -= place >= size ? size : 0;
      const float* const x = a.x + place / a.K * a.row + std::min(place % a.K, a.K - length);
      for (int64_t k = 0; k < length; ++k) nonzeros += x[k] != 0;
      if (++run == kFew && 20 * nonzeros > 9 * kFew * length) break;
    }
    return double(nonzeros) / double(run * length);
  }

  static Listed forward(const LinearForwardArgs& a) {
    const Blocks blocks(a.Out, kVectors);
    // Shorter tasks would fetch the weight more often.
    const int64_t tasks = a.threads == 1 ? 1 : std::min<int64_t>(4 * a.threads, (a.M + 31) / 32);
    int64_t nonzeros = 0;
    bool ones = true;
    parallel_for(a.threads, tasks, a.most * a.Out / tasks, [&](int64_t task, int thread) {
      Workspace workspace(a.workspace);
      RowLists lists(a, workspace, thread);
      const int64_t end = a.M * (task + 1) / tasks;
      for (int64_t row = a.M * task / tasks; row < end; row += lists.rows) {
        lists.fill(row, end);
        if (__atomic_add_fetch(&nonzeros, lists.begin[lists.rows], __ATOMIC_RELAXED) > a.most)
          return;
        if (!lists.ones) __atomic_store_n(&ones, false, __ATOMIC_RELAXED);
        for (int64_t block = 0; block < blocks.count; ++block)
          with_count<kVectors>(blocks.width(block) / VL, [&](auto vectors) {
            constexpr int NV = decltype(vectors)::value;
            lists.ones ? rows_of_y<NV, true>(a, lists, row, blocks, block)
                       : rows_of_y<NV, false>(a, lists, row, blocks, block);
          });
      }
    });
    return {nonzeros > a.most ? -1 : nonzeros, ones};
  }

  // ---- the gradients -----------------------------------------------------------------------------

  static void backward(const LinearBackwardArgs& a) { Gradient(a, a.workspace).run(a); }

 private:
  static constexpr int kVectors = 8;  // of a block, at most
  static constexpr int64_t kPiece = 32;

  static int64_t bytes_of_row(const LinearArgs& a) { return (a.K + 7) / 8; }
  // Returns a number of integers that fills cache lines, which threads must not share.
  static int64_t whole_lines(int64_t count) { return (count + 31) / 32 * 32; }

  // ---- lists -------------------------------------------------------------------------------------

  // Appends first + k for each k of a set of 8, and returns their number. Writes 8 numbers.
  static SNNLSTM_INLINE int64_t append(unsigned set, int64_t first, uint16_t* places) {
#if defined(__AVX2__)
    const __m128i lanes = _mm_cvtepu8_epi16(members_of(set));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(places),
                     _mm_add_epi16(lanes, _mm_set1_epi16(short(first))));
    return __builtin_popcount(set);
#else
    int64_t n = 0;
    for (int64_t k = 0; k < 8; ++k) {
      places[n] = uint16_t(first + k);
      n += set >> k & 1;
    }
    return n;
#endif
  }

  // Lists the places of the nonzeros in a row of x, and returns their number. Sets their bits, if
  // they are wanted, and clears `ones` if a nonzero is not 1. Writes whole vectors: kListSlack.
  static int64_t list_row(const float* x, int64_t K, uint16_t* places, uint8_t* bits, bool& ones) {
    int64_t n = 0, k = 0;
    const auto take = [&](unsigned set) __attribute__((always_inline)) {
      if (bits) bits[k / 8] = uint8_t(set);
      n += append(set, k, places + n);
    };
#if defined(__AVX2__)
    using S8 = Simd<float, 8>;
    S8::Mask others{};
    for (; k + 8 <= K; k += 8) {
      const S8::R v = S8::load(x + k);
      others |= (v != 0) & (v != 1);
      take(nonzero_lanes(v));
    }
    ones &= _mm256_testz_si256(__m256i(others), __m256i(others)) != 0;
#endif
    for (; k < K; k += 8) {
      unsigned set = 0;
      for (int64_t j = k; j < std::min(K, k + 8); ++j) {
        set |= unsigned(x[j] != 0) << (j - k);
        ones &= x[j] == 0 || x[j] == 1;
      }
      take(set);
    }
    return n;
  }

  // The same from the bits. Those beyond K do not count.
  static int64_t list_bits(const uint8_t* bits, int64_t K, uint16_t* places) {
    int64_t n = 0, k = 0;
    for (; k + 8 <= K; k += 8) n += append(bits[k / 8], k, places + n);
    if (k < K) n += append(bits[k / 8] & ((1u << (K - k)) - 1), k, places + n);
    return n;
  }

  // A thread's lists of some rows of x, as many as its memory takes.
  struct RowLists {
    static constexpr int64_t kRows = 2048, kPlaces = 1 << 17;

    const LinearArgs& a;
    const int64_t room = std::max(kPlaces, a.K);
    uint16_t* places;
    int32_t* begin;  // of each row, and the end of the last
    int64_t rows = 0;
    bool ones = true;  // whether all nonzeros are 1

    RowLists(const LinearArgs& args, Workspace& workspace, int thread) : a(args) {
      const int64_t size = whole_lines(room + kListSlack), most = whole_lines(kRows + 1);
      places = workspace.take<uint16_t>(a.threads * size) + thread * size;
      begin = workspace.take<int32_t>(a.threads * most) + thread * most;
    }

    // Lists the rows from `row` on, at most until `end`.
    void fill(int64_t row, int64_t end) {
      int64_t n = 0;
      ones = true;
      for (rows = 0; row + rows < end && rows < kRows && n + a.K <= room; ++rows) {
        begin[rows] = int32_t(n);
        uint8_t* const bits = a.nonzeros ? a.nonzeros + (row + rows) * bytes_of_row(a) : nullptr;
        n += list_row(a.x + (row + rows) * a.row, a.K, places + n, bits, ones);
      }
      begin[rows] = int32_t(n);
    }
  };

  // ---- sums --------------------------------------------------------------------------------------

  // Sets `sum` to the sum of the rows that a list names. A row has NV vectors, and is multiplied by
  // value(its place) unless all values are 1.
  template <int NV, bool ones, class Value>
  static SNNLSTM_INLINE void sum_piece(R (&sum)[NV], const uint16_t* list, int64_t n,
                                       const float* matrix, Value&& value) {
    // Two additions a cycle, each with a latency of four, need eight sums.
    constexpr int kChains = NV >= 6 ? 1 : NV >= 3 ? 2 : 4;
    R chains[kChains][NV] = {};
    const auto add = [&](R(&chain)[NV], int64_t place) __attribute__((always_inline)) {
      const float* const row = matrix + place * (NV * VL);
      if constexpr (ones) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) chain[v] += S::load(row + v * VL);
      } else {
        const R factor = S::splat(value(place));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) chain[v] += factor * S::load(row + v * VL);
      }
    };
    int64_t j = 0;
    for (; j + kChains <= n; j += kChains)
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) add(chains[chain], list[j + chain]);
    for (; j < n; ++j) add(chains[0], list[j]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      sum[v] = chains[0][v];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum[v] += chains[chain][v];
    }
  }

  // The same in pieces, because long sums in one register round worse than torch's.
  template <int NV, bool ones, class Value>
  static SNNLSTM_INLINE void sum_rows(R (&sum)[NV], const uint16_t* list, int64_t n,
                                      const float* matrix, Value&& value) {
    if (n <= kPiece * 3 / 2) return sum_piece<NV, ones>(sum, list, n, matrix, value);
    alignas(64) float total[NV * VL] = {};
    for (int64_t length; n > 0; list += length, n -= length) {
      length = n <= kPiece * 3 / 2 ? n : kPiece;
      sum_piece<NV, ones>(sum, list, length, matrix, value);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        sum[v] += S::load(total + v * VL);
        S::store(total + v * VL, sum[v]);
      }
    }
  }

  // Computes one block of the rows of y that are listed, from `first_row` on.
  template <int NV, bool ones>
  static void rows_of_y(const LinearForwardArgs& a, const RowLists& lists, int64_t first_row,
                        const Blocks& blocks, int64_t block) {
    const int64_t first = blocks.first(block), last = blocks.columns(block) - (NV - 1) * VL;
    const float* const weight = a.weight + first * a.K;
    alignas(64) float bias[NV * VL] = {};
    if (a.bias) std::memcpy(bias, a.bias + first, blocks.columns(block) * sizeof(float));
    for (int64_t row = 0; row < lists.rows; ++row) {
      const float* const x = a.x + (first_row + row) * a.row;
      float* const y = a.y + (first_row + row) * a.Out + first;
      R sum[NV];
      sum_rows<NV, ones>(sum, lists.places + lists.begin[row],
                         lists.begin[row + 1] - lists.begin[row], weight,
                         [&](int64_t k) __attribute__((always_inline)) { return x[k]; });
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const R result = sum[v] + S::load(bias + v * VL);
        if (v + 1 < NV || last == VL)
          S::store(y + v * VL, result);
        else
          store_some<S>(y + v * VL, result, last);
      }
    }
  }

  // ---- the gradients -----------------------------------------------------------------------------

  // The lists of columns are those of chunks of rows. A group of chunks is listed at once.
  struct Gradient {
    static constexpr int64_t kRows = 1024, kLists = 16 << 20;  // bytes of the lists of a group

    const LinearArgs& a;
    int64_t rows, chunks;  // of a chunk, and of a group
    int64_t room;          // of a list
    Workspace workspace;
    uint16_t* lists;   // (chunks, K, room)
    int32_t* lengths;  // (chunks, K)
    // Each thread's list of a row, block of grad_y (rows, vectors), and sums (K, vectors).
    uint16_t* places;
    float *grads, *sums;

    Gradient(const LinearArgs& args, void* memory) : a(args), workspace(memory) {
      rows = std::min(a.M, std::max<int64_t>(256, std::min(kRows, kLists / 2 / a.K)));
      room = whole_lines(rows) + 32;  // no power of two, whose lists would share cache sets
      chunks = std::max<int64_t>(1, kLists / (a.K * room * int64_t(sizeof(uint16_t))));
      chunks = std::min(chunks, (a.M + rows - 1) / rows);
      lists = workspace.take<uint16_t>(chunks * a.K * room);
      lengths = workspace.take<int32_t>(chunks * a.K);
      places = workspace.take<uint16_t>(a.threads * places_of_thread());
      grads = workspace.take<float>(a.threads * rows * kVectors * VL);
      sums = workspace.take<float>(a.threads * a.K * kVectors * VL);
    }
    int64_t places_of_thread() const { return whole_lines(a.K + kListSlack); }
    int64_t rows_from(int64_t row) const { return std::min(rows, a.M - row); }

    void run(const LinearBackwardArgs& b) const {
      const Blocks blocks(a.Out, kVectors);
      // Few blocks are divided by columns of x. Each part copies its block of grad_y.
      const int64_t parts =
          std::min((a.threads + blocks.count - 1) / blocks.count, (a.K + 63) / 64);
      for (int64_t begin = 0; begin < a.M; begin += chunks * rows) {
        const int64_t end = std::min(a.M, begin + chunks * rows);
        parallel_for(
            a.threads, (end - begin + rows - 1) / rows, rows * a.K, [&](int64_t chunk, int thread) {
              list_columns(begin + chunk * rows, chunk, places + thread * places_of_thread());
            });
        const int64_t some = (end - begin) * a.K / parts / 16 * blocks.width(0);
        parallel_for(a.threads, blocks.count * parts, some, [&](int64_t task, int thread) {
          const int64_t block = task / parts, part = task % parts;
          with_count<kVectors>(blocks.width(block) / VL, [&](auto vectors) {
            block_of<decltype(vectors)::value>(b, begin, end, blocks, block, a.K * part / parts,
                                               a.K * (part + 1) / parts, thread);
          });
        });
      }
    }

    // Lists the nonzeros in the columns of one chunk.
    void list_columns(int64_t first, int64_t chunk, uint16_t* row_places) const {
      uint16_t* const list = lists + chunk * a.K * room;
      int32_t* const length = lengths + chunk * a.K;
      std::memset(length, 0, a.K * sizeof(int32_t));
      for (int64_t row = 0; row < rows_from(first); ++row) {
        const int64_t n = list_bits(a.nonzeros + (first + row) * bytes_of_row(a), a.K, row_places);
        for (int64_t j = 0; j < n; ++j) {
          const int64_t k = row_places[j];
          list[k * room + length[k]++] = uint16_t(row);
        }
      }
    }

    // Adds the rows from `begin` to `end` to the gradients of one block of outputs and the columns
    // of x from k to k_end.
    template <int NV>
    void block_of(const LinearBackwardArgs& b, int64_t begin, int64_t end, const Blocks& blocks,
                  int64_t block, int64_t k, int64_t k_end, int thread) const {
      constexpr int64_t width = NV * VL;
      const int64_t first = blocks.first(block), columns = blocks.columns(block);
      float* const grad = grads + thread * rows * kVectors * VL;
      float* const sum = sums + thread * a.K * kVectors * VL;
      float* const to = b.grad_weight + first * a.K + k;
      const bool adds = begin > 0, part_of_bias = b.grad_bias && k == 0;
      double bias[width] = {};
      if (adds) load_row<S>(to, a.K, 1, k_end - k, columns, sum, Row{width}, width);
      for (int64_t c = 0; adds && part_of_bias && c < columns; ++c)
        bias[c] = b.grad_bias[first + c];
      for (int64_t row = begin, chunk = 0; row < end; row += rows, ++chunk) {
        pack_grads<NV>(b.grad_y + row * a.Out + first, rows_from(row), columns, grad, bias);
        a.x ? add_columns<NV, false>(row, chunk, k, k_end, grad, sum)
            : add_columns<NV, true>(row, chunk, k, k_end, grad, sum);
      }
      store_row<S>(sum, Row{width}, k_end - k, columns, to, a.K, 1, [](R v, int64_t) { return v; });
      for (int64_t c = 0; part_of_bias && c < columns; ++c) b.grad_bias[first + c] = float(bias[c]);
    }

    // Copies some columns of n rows of grad_y, and adds them to `bias`.
    template <int NV>
    void pack_grads(const float* from, int64_t n, int64_t columns, float* to, double* bias) const {
      R piece[NV] = {};
      for (int64_t row = 0; row < n; ++row, from += a.Out, to += NV * VL) {
        if (columns == NV * VL) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) S::store(to + v * VL, S::load(from + v * VL));
        } else {
          std::memcpy(to, from, columns * sizeof(float));
          std::memset(to + columns, 0, (NV * VL - columns) * sizeof(float));
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) piece[v] += S::load(to + v * VL);
        if ((row + 1) % (kPiece / 2) != 0 && row + 1 < n) continue;
        alignas(64) float sum[NV * VL];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) S::store(sum + v * VL, piece[v]), piece[v] = R{};
        for (int64_t c = 0; c < NV * VL; ++c) bias[c] += double(sum[c]);
      }
    }

    // Adds the rows of grad_y that the columns of a chunk list. The first chunk of all has no sums
    // to add to.
    template <int NV, bool ones>
    void add_columns(int64_t first, int64_t chunk, int64_t k, int64_t k_end, const float* grad,
                     float* sum) const {
      const uint16_t* const list = lists + chunk * a.K * room;
      const int32_t* const length = lengths + chunk * a.K;
      for (; k < k_end; ++k, sum += NV * VL) {
        R piece[NV];
        const auto value = [&](int64_t row) __attribute__((always_inline)) {
          return a.x[(first + row) * a.row + k];
        };
        sum_rows<NV, ones>(piece, list + k * room, length[k], grad, value);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
          S::store(sum + v * VL, first > 0 ? S::load(sum + v * VL) + piece[v] : piece[v]);
      }
    }
  };
};

SNNLSTM_END_ISA
