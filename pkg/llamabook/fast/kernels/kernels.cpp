// The kernels for decoding on a CPU, written by hand; ch04_kv_cache_and_compile/04_the_roofline.ipynb walks through them.
//
// One token at a time, a model does two operations for each weight that it reads, so it can be as fast as the memory.
// Four habits let the code keep up with it:
//  - it asks for memory before it needs it (prefetch), since the hardware's own guess ends at each page of 4 KB;
//  - every sum is kept in lanes, which are vectors in registers on any CPU, with several of them under way at a time;
//  - bf16 becomes float32 in registers, never in memory;
//  - what is used again, a few rows of x or of the cache, is laid out so that it stays in the first-level cache.
// The order of every sum depends on the constants below alone: not on the number of threads, nor on the other rows.
// Vectors are those of GCC and Clang; libtorch is called through its stable interface, whose headers compile fast.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;  // floats in a vector, and vectors that the CPU can name
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
constexpr int ROWS = 8;  // rows of x that share one pass over the weights
constexpr int64_t WIDTH = 2048;  // bytes of each row of x that one pass takes: 8 rows of it are half a first-level cache
constexpr int64_t BLOCK = 65536;  // bytes of weights for each row of a tile that all passes go over before the next ones
constexpr int64_t SHARE = 65536;  // bytes of weights that a thread takes at a time, or more
constexpr int64_t CHUNK = 256;  // cache slots that one task of attention reads
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bf16 {  // the upper half of a float32
  uint16_t bits;
};

// ---- one number and one vector, in and out of memory

static inline float widen(float x) { return x; }

static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

static inline void store(float x, float* to) { *to = x; }

static inline void store(float x, bf16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

static inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

static inline Floats load(const bf16* from) {
#ifdef __AVX512F__  // one instruction, for which GCC takes five
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
#endif
}

static inline void store(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }

static inline void store(Floats x, bf16* to) {  // each as above
  const Words bits = (Words)x, near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves y = __builtin_convertvector(x == x ? near : Words{} + 0x7fc0, Halves);
  std::memcpy(to, &y, sizeof y);
}

static inline Floats sum(Floats a, Floats b) { return a + b; }

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// a0 and a1, a2 and a3, ..., then the same of b, each two joined to one
template <Floats (*join)(Floats, Floats) = sum>
static inline Floats neighbours(Floats a, Floats b) {
#ifdef __clang__
  const auto pick = [&]<int... I>(std::integer_sequence<int, I...>) {
    return join(__builtin_shufflevector(a, b, 2 * I...), __builtin_shufflevector(a, b, 2 * I + 1 ...));
  };
  return pick(std::make_integer_sequence<int, LANES>());
#else
  Ints even;
  for (int i = 0; i < LANES; i++) even[i] = 2 * i;
  return join(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1));
#endif
}

template <Floats (*join)(Floats, Floats)>
static inline float over_all(Floats x) {
  for (int n = LANES; n > 1; n /= 2) x = neighbours<join>(x, x);
  return x[0];
}

static inline float add_up(Floats x) { return over_all<sum>(x); }

static inline void ask_for(const void* from, int64_t bytes) {  // so that it is in the second-level cache when it is read
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at, 0, 2);
}

// ---- how products are added to a vector of sums: `count` numbers of a weight and of x at a time

struct Wide {  // one number to a lane, x in float32
  typedef float Number;
  typedef Floats Vector;
  static constexpr int64_t count = LANES;
  template <typename E>
  static inline Vector get(const E* from) { return load(from); }
  static inline Floats add(Floats sum, Vector w, Vector x) { return sum + w * x; }
  template <typename E>
  static inline Number number(E x) { return widen(x); }
};

#ifdef __AVX512BF16__
struct Paired {  // two bf16 to a lane, by the one instruction that multiplies 32 pairs and adds them to 16 floats
  typedef bf16 Number;
  typedef __m512bh Vector;
  static constexpr int64_t count = 2 * LANES;
  static inline Vector get(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static inline Floats add(Floats sum, Vector w, Vector x) { return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
  static inline Number number(bf16 x) { return x; }
};
typedef Paired Half;
#else
typedef Wide Half;
#endif

// ---- y = x W^T

// T rows of x as the tiles read them: `count` numbers of each row in turn, filled up with zeros
template <typename How, typename E>
static void pack(const E* x, int64_t T, int64_t K, typename How::Number* to) {
  for (int64_t k = 0; k < K; k += How::count)
    for (int64_t t = 0; t < T; t++, to += How::count)
      for (int64_t i = 0; i < How::count; i++) to[i] = k + i < K ? How::number(x[t * K + k + i]) : typename How::Number{};
}

// Adds to sums (R, T, LANES) the products of R rows of the weight, `stride` apart, with T packed rows of x, over K numbers.
// Each weight is read once, and what stands `ahead` of it is asked for; one stream alone the hardware foresees better.
template <typename How, int R, int T, typename W>
static inline void tile(const W* w, int64_t stride, int64_t ahead, const typename How::Number* x, int64_t K, float* sums) {
  Floats sum[R][T];
  std::memcpy(sum, sums, sizeof sum);
  const auto step = [&](const W* from, int64_t apart) {
    typename How::Vector weight[R];
    for (int r = 0; r < R; r++) weight[r] = How::get(from + r * apart);
    for (int t = 0; t < T; t++, x += How::count) {
      const typename How::Vector number = How::get(x);
      for (int r = 0; r < R; r++) sum[r][t] = How::add(sum[r][t], weight[r], number);
    }
  };
  int64_t k = 0;
  for (; k + How::count <= K; k += How::count) {
    for (int r = 0; T > 1 && r < R; r++) __builtin_prefetch(w + r * stride + k + ahead, 0, 2);
    step(w + k, stride);
  }
  if (k < K) {
    W rest[R][How::count] = {};
    for (int r = 0; r < R; r++) std::memcpy(rest[r], w + r * stride + k, (K - k) * sizeof(W));
    step(rest[0], How::count);
  }
  std::memcpy(sums, sum, sizeof sum);
}

// y[t][n] = w[n] . x[t] for T packed rows of x and the rows `begin` to `end` of the weight
template <typename How, int T, typename W>
static void multiply(const typename How::Number* x, const W* weight, W* y, int64_t N, int64_t K, int64_t stride,
                     int64_t begin, int64_t end) {
  constexpr int R = T == 1 ? 1 : std::clamp((REGISTERS - 8) / T, 1, 4);  // R x T sums stay in registers
  const int64_t width = T == 1 ? K : WIDTH / sizeof(typename How::Number);
  const int64_t tiles = T == 1 ? 1 : std::clamp<int64_t>(BLOCK / std::max<int64_t>(K * sizeof(W), 1), 1, 16);
  const int64_t height = tiles * R;
  std::vector<float> sums;
  for (int64_t top = begin; top < end; top += height) {
    const int64_t bottom = std::min(top + height, end), ahead = height * stride;
    sums.assign(height * T * LANES, 0.0f);
    for (int64_t k = 0; k < K; k += width) {
      const int64_t part = std::min(width, K - k);
      float* sum = sums.data();
      int64_t n = top;
      for (; n + R <= bottom; n += R, sum += R * T * LANES)
        tile<How, R, T>(weight + n * stride + k, stride, ahead, x + k * T, part, sum);
      for (; n < bottom; n++, sum += T * LANES) tile<How, 1, T>(weight + n * stride + k, stride, ahead, x + k * T, part, sum);
    }
    for (int64_t n = top; n < bottom; n++)
      for (int64_t t = 0; t < T; t++) store(add_up(load(&sums[((n - top) * T + t) * LANES])), y + t * N + n);
  }
}

// Has the threads do `work` from 0 to `count`, none of which are equally fast: each takes a share of what is left, again
// and again, first large ones, since each is a new stream for the memory, then small ones, so that all end together.
template <typename Work>
static void share_out(int64_t count, int64_t least, int64_t most, const Work& work) {
  const int64_t takers = std::min<int64_t>(torch::stable::get_num_threads(), (count + least - 1) / least);
  std::atomic<int64_t> next{0};
  parallel_for(0, takers, 1, [&](int64_t, int64_t) {
    for (int64_t first = next; first < count;) {
      const int64_t share = std::min(std::max((count - first) / (2 * takers), least), most);
      const int64_t end = std::min(first + share, count);
      if (!next.compare_exchange_weak(first, end)) continue;  // another one was faster, and `first` is where it ends
      work(first, end);
      first = next;
    }
  });
}

// y (rows, N) of x (rows, K) and weight (N, K), whose rows are `stride` apart
template <typename How, typename E>
static void multiply_all(const E* x, const E* weight, E* y, int64_t rows, int64_t N, int64_t K, int64_t stride) {
  static_assert(ROWS == 8);
  constexpr decltype(&multiply<How, 1, E>) of[] = {
      multiply<How, 1, E>, multiply<How, 2, E>, multiply<How, 3, E>, multiply<How, 4, E>,
      multiply<How, 5, E>, multiply<How, 6, E>, multiply<How, 7, E>, multiply<How, 8, E>};
  const int64_t padded = (K + How::count - 1) / How::count * How::count;
  std::vector<typename How::Number> packed(ROWS * padded);
  for (int64_t t = 0; t < rows; t += ROWS) {
    const int64_t T = std::min<int64_t>(ROWS, rows - t);
    pack<How>(x + t * K, T, K, packed.data());
    share_out(N, std::max<int64_t>(1, SHARE / std::max<int64_t>(1, K * sizeof(E))), N, [&](int64_t begin, int64_t end) {
      of[T - 1](packed.data(), weight, y + t * N, N, K, stride, begin, end);
    });
  }
}

// x (rows, K) and weight (N, K), of one dtype, float32 or bf16, to (rows, N)
Tensor linear(const Tensor& x, const Tensor& weight) {
  const int64_t rows = x.size(0), N = weight.size(0), K = weight.size(1), stride = weight.stride(0);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == K && x.scalar_type() == weight.scalar_type(),
                  "x (rows, K) and weight (N, K) must fit and have one dtype");
  STD_TORCH_CHECK(weight.stride(1) == 1 || K < 2, "each row of the weight must be contiguous");
  const Tensor in = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {rows, N});
  if (x.scalar_type() == ScalarType::Float) {
    multiply_all<Wide>((const float*)in.data_ptr(), (const float*)weight.data_ptr(), (float*)y.data_ptr(), rows, N, K, stride);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "the dtype must be float32 or bfloat16");
    multiply_all<Half>((const bf16*)in.data_ptr(), (const bf16*)weight.data_ptr(), (bf16*)y.data_ptr(), rows, N, K, stride);
  }
  return y;
}

// ---- y = x W^T of a weight in 8 or 4 bits

constexpr int TALL = 16;  // rows of the weight in a block, of which a vector holds LANES
constexpr int PARTS = TALL / LANES;
constexpr int GROUP = 32;  // columns; a group of weights holds one such group or several
constexpr int MOST = std::clamp((REGISTERS - 4) / (2 * PARTS), 1, ROWS);  // rows of x whose sums stay in registers

// A weight as Python packs it: of each row of a block four codes in turn, so that the lanes of a vector meet the same four
// numbers of x. w = scale * (code - middle) + zero, with a scale and a zero for each row and group of columns. In 4 bits a
// byte has two codes, the first in its lower half; so of eight columns the even ones come first, then the odd ones.
struct Codes {
  const uint8_t* codes;  // (blocks, K / 4, TALL, 4), or half of that
  const bf16 *scales, *zeros;  // (blocks, groups, TALL); zeros may be missing
  int bits;
  int64_t blocks, groups, K;  // K with what fills up the last group

  explicit Codes(const std::vector<Tensor>& parts)
      : codes((const uint8_t*)parts[0].data_ptr()), scales((const bf16*)parts[1].data_ptr()),
        zeros(parts.size() > 2 ? (const bf16*)parts[2].data_ptr() : nullptr), bits(parts[0].dim() == 3 ? 8 : 4),
        blocks(parts[1].size(0)), groups(parts[1].size(1)), K(parts[0].numel() / blocks * 8 / (TALL * bits)) {}
  int64_t bytes() const { return K * TALL * bits / 8; }  // of a block
};

constexpr int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of eight columns in 4 bits

static inline uint32_t every_other(uint64_t bytes) {  // of eight, from the lowest on
  bytes &= 0x00ff00ff00ff00ff;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffff;
  return bytes | bytes >> 16;
}

// x as it is, in float32
struct Exact {
  struct Four { float number[4]; };
  typedef Floats Sum;
  static inline Sum start(int32_t) { return Sum{}; }
  template <int MIDDLE>
  static inline Sum add(Sum sum, Words codes, Four x) {
    for (int j = 0; j < 4; j++)
      sum += (__builtin_convertvector((Ints)(codes >> 8 * j & 255), Floats) - float(MIDDLE)) * x.number[j];
    return sum;
  }
  static inline Floats finish(Sum sum) { return sum; }

  static void take(const float* x, int middle, Four* to, int64_t step, int32_t& offset, float& scale, float& sum, Floats&) {
    sum = 0;
    for (int i = 0; i < GROUP; i++) sum += x[i], to[i / 4 * step].number[i % 4] = x[middle == 8 ? i / 8 * 8 + ORDER[i % 8] : i];
    offset = 0, scale = 1;
  }
};

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
// x rounded to 8 bits, with a scale for each GROUP, and whole numbers multiplied and added up by fours. The instructions
// take codes from 0 up: what is too much, middle times the sum of x, each sum starts below 0. AVX2 alone has them add up
// pairs in 16 bits, too few for codes of 8; so there a code gives its sign to x.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool SIGNED = false;
#else
constexpr bool SIGNED = true;
#endif
struct Rounded {
  typedef int32_t Four;
  typedef Ints Sum;
  static inline Sum start(int32_t offset) { return Sum{} + offset; }
  template <int MIDDLE>
  static inline Sum add(Sum sum, Words codes, Four x) {
#ifdef __AVX512VNNI__
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
    return (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(x));
#else
    __m256i w = (__m256i)codes, four = _mm256_set1_epi32(x);
    if (MIDDLE == 128) {
      w = (__m256i)(codes ^ 0x80808080);
      four = _mm256_sign_epi8(four, w), w = _mm256_abs_epi8(w);
    }
    return sum + (Sum)_mm256_madd_epi16(_mm256_maddubs_epi16(w, four), _mm256_set1_epi16(1));
#endif
  }
  static inline Floats finish(Sum sum) { return __builtin_convertvector(sum, Floats); }

  static void take(const float* x, int middle, Four* to, int64_t step, int32_t& offset, float& scale, float& sum, Floats& odd) {
    Floats high = {};
    for (int i = 0; i < GROUP; i += LANES) {
      const Floats a = load(x + i);
      high = larger(a < 0.0f ? -a : a, high), odd += a * 0.0f;
    }
    const float most = over_all<larger>(high), turns = most > 1e-36f ? 127 / most : 0.0f;  // less counts as nothing
    int8_t codes[GROUP];
    int32_t total = 0;
    for (int i = 0; i < GROUP; i++) {
      const int32_t code = __builtin_rintf(x[i] * turns);
      codes[i] = code, total += code;
    }
    for (int i = 0; i < GROUP / 8; i++, to += 2 * step) {
      uint64_t eight;
      std::memcpy(&eight, codes + 8 * i, 8);
      to[0] = middle == 8 ? every_other(eight) : eight, to[step] = middle == 8 ? every_other(eight >> 8) : eight >> 32;
    }
    scale = most / 127, sum = scale * total;
    offset = SIGNED && middle == 128 ? 0 : -middle * total;
  }
};
#else
typedef Exact Rounded;
#endif

// T rows of x as the blocks meet them: four numbers of each row in turn, and what belongs to each GROUP
template <typename How>
struct Few {
  std::vector<typename How::Four> fours;  // (K / 4, T)
  std::vector<int32_t> offsets;  // (K / GROUP, T)
  std::vector<float> scales, sums;

  template <typename E>
  void take(const E* x, int64_t T, int64_t K, int64_t padded, int bits) {
    const int64_t count = padded / GROUP * T;
    fours.resize(padded / 4 * T), offsets.resize(count), scales.resize(count), sums.resize(count);
    for (int64_t t = 0; t < T; t++) {
      Floats odd = {};  // no number where one of x is none
      for (int64_t k = 0; k < padded; k += GROUP) {
        const int64_t i = k / GROUP * T + t;
        float number[GROUP] = {};
        if (k + GROUP <= K)
          for (int j = 0; j < GROUP; j += LANES) store(load(x + t * K + k + j), number + j);
        else
          for (int64_t j = 0; k + j < K; j++) number[j] = widen(x[t * K + k + j]);
        How::take(number, 1 << (bits - 1), &fours[k / 4 * T + t], T, offsets[i], scales[i], sums[i], odd);
      }
      scales[t] += add_up(odd);
    }
  }
};

// y (T, TALL) = the products of one block of the weight with T rows of x
template <typename How, int BITS, int T>
static void multiply_block(const Codes& w, int64_t block, const Few<How>& x, float* y) {
  constexpr int MIDDLE = 1 << (BITS - 1);
  constexpr int64_t AHEAD = 4096;  // bytes
  const uint8_t* codes = w.codes + block * w.bytes();
  const bf16 *scales = w.scales + block * w.groups * TALL, *zeros = w.zeros ? w.zeros + block * w.groups * TALL : nullptr;
  const typename How::Four* four = x.fours.data();
  const int64_t per_group = w.K / w.groups / GROUP;
  Floats sum[T][PARTS] = {};
  for (int64_t g = 0, i = 0; g < w.groups; g++, scales += TALL) {
    Floats part[T][PARTS] = {};
    for (const int64_t end = i + per_group * T; i < end; i += T) {
      typename How::Sum dot[T][PARTS];
      for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) dot[t][p] = How::start(x.offsets[i + t]);
      for (int k = 0; k < GROUP; k += 8, codes += BITS * TALL, four += 2 * T) {
        if (T > 1) ask_for(codes + AHEAD, BITS * TALL);
        for (int p = 0; p < PARTS; p++) {
          Words first, second;
          std::memcpy(&first, codes + p * sizeof first, sizeof first);
          if (BITS == 8)
            std::memcpy(&second, codes + 4 * TALL + p * sizeof first, sizeof second);
          else
            second = first >> 4 & 0x0f0f0f0f, first &= 0x0f0f0f0f;
          for (int t = 0; t < T; t++) dot[t][p] = How::template add<MIDDLE>(dot[t][p], first, four[t]);
          for (int t = 0; t < T; t++) dot[t][p] = How::template add<MIDDLE>(dot[t][p], second, four[T + t]);
        }
      }
      for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) part[t][p] += How::finish(dot[t][p]) * x.scales[i + t];
      for (int p = 0; zeros && p < PARTS; p++)
        for (int t = 0; t < T; t++) sum[t][p] += load(zeros + g * TALL + p * LANES) * x.sums[i + t];
    }
    for (int p = 0; p < PARTS; p++) {
      const Floats scale = load(scales + p * LANES);
      for (int t = 0; t < T; t++) sum[t][p] += part[t][p] * scale;
    }
  }
  std::memcpy(y, sum, sizeof sum);
}

// y (rows, N) of x (rows, K) and the codes
template <typename How, typename E>
static void multiply_codes(const E* x, const Codes& w, E* y, int64_t rows, int64_t N, int64_t K) {
  const auto all = []<int... T>(std::integer_sequence<int, T...>) {
    typedef decltype(&multiply_block<How, 8, 1>) Multiply;
    return std::array<std::array<Multiply, MOST>, 2>{{{multiply_block<How, 8, T + 1>...}, {multiply_block<How, 4, T + 1>...}}};
  };
  const auto of = all(std::make_integer_sequence<int, MOST>())[w.bits == 4];
  const int64_t tiles = (rows + MOST - 1) / MOST;
  const auto tall = [&](int64_t tile) { return std::min<int64_t>(MOST, rows - tile * MOST); };
  std::vector<Few<How>> few(tiles);
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) few[i].take(x + i * MOST * K, tall(i), K, w.K, w.bits);
  };
  if (tiles > 1) parallel_for(0, tiles, 1, take);
  else take(0, tiles);

  const int64_t least = std::max<int64_t>(1, SHARE / w.bytes());  // blocks that stay in a cache while all tiles go over them
  share_out(w.blocks, least, tiles > 1 ? 4 * least : w.blocks, [&](int64_t begin, int64_t end) {
    float sums[MOST * TALL];
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t block = begin; block < end; block++) {
        of[tall(tile) - 1](w, block, few[tile], sums);
        for (int64_t t = 0; t < tall(tile); t++)
          for (int64_t r = 0; r < std::min<int64_t>(TALL, N - block * TALL); r++)
            store(sums[t * TALL + r], y + (tile * MOST + t) * N + block * TALL + r);
      }
  });
}

static void check_codes(const std::vector<Tensor>& weight, int64_t N, int64_t K) {
  const bool three = weight.size() == 3, two = weight.size() == 2;
  STD_TORCH_CHECK(two || three, "a weight in codes has codes, scales and perhaps zeros");
  STD_TORCH_CHECK(weight[0].numel() > 0 && (weight[0].dim() == 3 || weight[0].dim() == 4) && weight[0].scalar_type() == ScalarType::Byte &&
                      weight[0].is_contiguous() && weight[1].dim() == 3 && weight[1].size(2) == TALL &&
                      weight[1].size(0) > 0 && weight[0].size(0) == weight[1].size(0) && weight[1].size(1) > 0,
                  "codes and scales must be in blocks, as Python packs them");
  for (size_t i = 1; i < weight.size(); i++)
    STD_TORCH_CHECK(weight[i].scalar_type() == ScalarType::BFloat16 && weight[i].is_contiguous() &&
                        weight[i].numel() == weight[1].numel(),
                    "scales and zeros must be alike, in bfloat16");
  const Codes w(weight);
  STD_TORCH_CHECK(w.K % (GROUP * w.groups) == 0 && w.K >= K && (w.blocks - 1) * TALL < N && N <= w.blocks * TALL,
                  "the codes don't fit the product");
}

template <typename E>
static void multiply_any(const E* x, const Codes& w, E* y, int64_t rows, int64_t N, int64_t K, bool exact) {
  exact ? multiply_codes<Exact>(x, w, y, rows, N, K) : multiply_codes<Rounded>(x, w, y, rows, N, K);
}

// x (rows, K), float32 or bf16, and a weight of N rows in codes, to (rows, N); exact: without rounding x
Tensor quantized_linear(const Tensor& x, std::vector<Tensor> weight, int64_t N, bool exact) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be (rows, K)");
  check_codes(weight, N, x.size(1));
  const Tensor in = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), N});
  const Codes w(weight);
  if (x.scalar_type() == ScalarType::Float) {
    multiply_any((const float*)in.data_ptr(), w, (float*)y.data_ptr(), x.size(0), N, x.size(1), exact);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "the dtype must be float32 or bfloat16");
    multiply_any((const bf16*)in.data_ptr(), w, (bf16*)y.data_ptr(), x.size(0), N, x.size(1), exact);
  }
  return y;
}

bool rounds() { return !std::is_same_v<Exact, Rounded>; }  // whether this CPU has a path that rounds x

// ---- attention from a few positions to a cache of many

// e^x for x <= 0, to 1e-7 of itself; 0 below -87
static inline Floats exponential(Floats x) {
  const Floats turns = x * 1.44269504f, magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds
  const Floats n = (turns + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x = n ln 2 + r
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;  // the float 2^n
  return x < -87.0f ? Floats{} : p * (Floats)power;
}

// What some queries make of some slots: softmax not yet divided. Two of these join without seeing the slots again.
struct Part {
  float* maximum;  // (M,), of the scores
  float* total;  // (M,), of e^(score - maximum)
  float* context;  // (M, d), values weighted so
};

// scores[s] = q . k[s] for LANES keys (LANES, d): a vector of sums for each, whose lanes then add up, all at once
template <typename How, int D, typename E>
static inline void score(const typename How::Number* q, int64_t d, const E* keys, float* scores) {
  if (D) d = D;
  const int64_t parts = d / How::count;
  typename How::Vector query[(D ? D : MAX_HEAD_DIM) / How::count];
  for (int64_t i = 0; i < parts; i++) query[i] = How::get(q + i * How::count);
  Floats sums[LANES] = {};
  for (int j = 0; j < LANES; j++)
    for (int64_t i = 0; i < parts; i++) sums[j] = How::add(sums[j], How::get(keys + j * d + i * How::count), query[i]);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int j = 0; j < n; j++) sums[j] = neighbours(sums[2 * j], sums[2 * j + 1]);
  std::memcpy(scores, &sums[0], sizeof sums[0]);
}

// context[m] = the sum of weights[m][s] v[s] over `count` slots, for M queries (M, d), Q of them at a time. What will be
// read after it, as much from `next` on, is asked for meanwhile.
template <int Q, int D, typename E>
static void mix(const float* weights, int64_t M, int64_t d, const E* values, int64_t stride, int64_t count, const E* next,
                float* context) {
  const int64_t parts = (D ? D : d) / LANES;
  for (int64_t m = 0; m + Q <= M; m += Q) {
    Floats sums[Q][(D ? D : MAX_HEAD_DIM) / LANES] = {};
    for (int64_t s = 0; s < count; s++) {
      if (m == 0) ask_for(next + s * stride, d * sizeof(E));
      for (int64_t i = 0; i < parts; i++) {
        const Floats value = load(values + s * stride + i * LANES);
        for (int q = 0; q < Q; q++) sums[q][i] += value * weights[(m + q) * CHUNK + s];
      }
    }
    for (int q = 0; q < Q; q++) std::memcpy(context + (m + q) * d, sums[q], d * sizeof(float));
  }
  if (Q > 1 && M % Q) mix<1, D>(weights + M / Q * Q * CHUNK, M % Q, d, values, stride, count, next,
                                context + M / Q * Q * d);
}

// Queries m = 0..M - 1 (M, d) see the first seen[m] of `count` slots. D is d where it is known in advance.
template <typename How, int D, typename E>
static void attend(const typename How::Number* queries, const int64_t* seen, int64_t M, int64_t d, const E* keys,
                   int64_t key_stride, const E* values, int64_t value_stride, int64_t count, Part part) {
  if (D) d = D;
  const float scale = 1 / std::sqrt(float(d));
  const int64_t padded = (count + LANES - 1) / LANES * LANES;
  std::vector<float> scores(M * CHUNK);
  E rest[LANES * (D ? D : MAX_HEAD_DIM)] = {};
  for (int64_t s = 0; s < count; s += LANES) {
    const int64_t end = std::min(s + LANES, count);
    const bool whole = s + LANES <= count && key_stride == d;
    for (int64_t j = s; j < end; j++) {
      ask_for(values + j * value_stride, d * sizeof(E));
      if (!whole) std::memcpy(rest + (j - s) * d, keys + j * key_stride, d * sizeof(E));
    }
    for (int64_t m = 0; m < M; m++)
      score<How, D>(queries + m * d, d, whole ? keys + s * key_stride : rest, &scores[m * CHUNK + s]);
  }
  for (int64_t m = 0; m < M; m++) {
    float* score = scores.data() + m * CHUNK;
    for (int64_t s = std::max<int64_t>(0, seen[m]); s < padded; s++) score[s] = -INFINITE;
    Floats most = load(score);
    for (int64_t s = LANES; s < padded; s += LANES) most = load(score + s) > most ? load(score + s) : most;
    const float maximum = over_all<larger>(most);
    part.maximum[m] = maximum * scale;
    Floats sum = {};
    for (int64_t s = 0; s < padded; s += LANES) {
      const Floats weight = exponential((load(score + s) - (maximum == -INFINITE ? 0.0f : maximum)) * scale);
      sum += weight;
      std::memcpy(score + s, &weight, sizeof weight);
    }
    part.total[m] = add_up(sum);
  }
  constexpr int Q = D ? std::max(1, (REGISTERS / 2) * LANES / D) : 1;  // their sums stay in registers
  mix<Q, D>(scores.data(), M, d, values, value_stride, count, keys + CHUNK * key_stride, part.context);
}

// Joins the parts of one query over all chunks; `step` parts lie between two of them
static void join(const Part& first, int64_t chunks, int64_t step, int64_t d, float* context) {
  float maximum = -INFINITE, total = 0;
  for (int64_t c = 0; c < chunks; c++)
    if (first.total[c * step] != 0) maximum = std::max(maximum, first.maximum[c * step]);
  std::fill(context, context + d, 0.0f);
  for (int64_t c = 0; c < chunks; c++) {
    if (first.total[c * step] == 0) continue;  // nothing seen, and nothing written
    const float scale = std::exp(first.maximum[c * step] - maximum);
    total += first.total[c * step] * scale;
    for (int64_t i = 0; i < d; i++) context[i] += first.context[c * step * d + i] * scale;
  }
  for (int64_t i = 0; i < d; i++) context[i] /= total;
}

template <typename How, typename E>
static void attend_all(const Tensor& q, const Tensor& keys, const Tensor& values, const int64_t* positions, Tensor& y) {
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), d = q.size(3), G = keys.size(1);
  if (d % How::count) return attend_all<Wide, E>(q, keys, values, positions, y);
  const int64_t each = H / G, M = T * each;  // queries that share keys
  const E *Q = (const E*)q.data_ptr(), *K = (const E*)keys.data_ptr(), *V = (const E*)values.data_ptr();
  E* out = (E*)y.data_ptr();

  std::vector<int64_t> slots(B, 0);  // that some query of row b sees
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < T; t++) slots[b] = std::max(slots[b], positions[b * T + t] + 1);
  const int64_t chunks = (*std::max_element(slots.begin(), slots.end()) + CHUNK - 1) / CHUNK;
  const int64_t tasks = B * G * chunks;
  std::vector<float> maximum(tasks * M, -INFINITE), total(tasks * M, 0.0f), context(tasks * M * d, 0.0f);
  const auto part = [&](int64_t task, int64_t m) {
    const int64_t at = task * M + m;
    return Part{&maximum[at], &total[at], &context[at * d]};
  };

  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<typename How::Number> queries(M * d);
    std::vector<int64_t> seen(M);
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / (G * chunks), g = task / chunks % G, first = task % chunks * CHUNK;
      const int64_t count = std::min(CHUNK, slots[b] - first);
      if (count <= 0) continue;
      for (int64_t m = 0; m < M; m++) {
        const int64_t t = m / each, h = g * each + m % each;
        const E* from = Q + b * q.stride(0) + t * q.stride(1) + h * q.stride(2);
        seen[m] = positions[b * T + t] + 1 - first;
        for (int64_t i = 0; i < d; i++) queries[m * d + i] = How::number(from[i]);
      }
      const E* k = K + b * keys.stride(0) + g * keys.stride(1) + first * keys.stride(2);
      const E* v = V + b * values.stride(0) + g * values.stride(1) + first * values.stride(2);
      const auto run = d == 64 ? attend<How, 64, E> : d == 128 ? attend<How, 128, E> : attend<How, 0, E>;
      run(queries.data(), seen.data(), M, d, k, keys.stride(2), v, values.stride(2), count, part(task, 0));
    }
  });

  parallel_for(0, B * G, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> joined(d);
    for (int64_t bg = begin; bg < end; bg++)
      for (int64_t m = 0; m < M; m++) {
        join(part(bg * chunks, m), chunks, M, d, joined.data());
        const int64_t b = bg / G, t = m / each, h = bg % G * each + m % each;
        for (int64_t i = 0; i < d; i++) store(joined[i], out + ((b * T + t) * H + h) * d + i);
      }
  });
}

static void check_attention(int64_t B, int64_t T, const Tensor& keys, const Tensor& values, const Tensor& input_pos,
                            ScalarType type) {
  STD_TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && input_pos.dim() == 2, "keys and values have 4 dimensions, input_pos 2");
  const int64_t S = keys.size(2), d = keys.size(3);
  STD_TORCH_CHECK(keys.size(0) == B && keys.size(1) > 0, "keys have another number of rows");
  for (int64_t i = 0; i < 4; i++) STD_TORCH_CHECK(values.size(i) == keys.size(i), "keys and values differ in shape");
  STD_TORCH_CHECK(input_pos.size(0) == B && input_pos.size(1) == T && input_pos.scalar_type() == ScalarType::Long,
                  "input_pos must be (B, T), int64");
  STD_TORCH_CHECK(d % 16 == 0 && d <= MAX_HEAD_DIM, "head_dim must be a multiple of 16, at most 256");
  STD_TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1, "each vector must be contiguous");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "the dtype must be float32 or bfloat16");
  STD_TORCH_CHECK(keys.scalar_type() == type && values.scalar_type() == type, "keys and values must have the same dtype");
  const Tensor pos = torch::stable::contiguous(input_pos);
  const int64_t* positions = (const int64_t*)pos.data_ptr();
  for (int64_t i = 0; i < B * T; i++)
    STD_TORCH_CHECK(positions[i] >= 0 && positions[i] < S, "position ", positions[i], " is outside a cache of ", S);
}

// q (B, T, H, d), keys and values (B, G, S, d) of one dtype, input_pos (B, T), to (B, T, H, d)
Tensor decode_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& input_pos) {
  STD_TORCH_CHECK(q.dim() == 4 && q.stride(3) == 1, "q has 4 dimensions, the last contiguous");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), d = q.size(3);
  check_attention(B, T, keys, values, input_pos, q.scalar_type());
  STD_TORCH_CHECK(keys.size(3) == d && H % keys.size(1) == 0, "q and keys don't fit each other");
  Tensor y = torch::stable::new_empty(q, {B, T, H, d});
  if (y.numel() == 0) return y;
  const Tensor pos = torch::stable::contiguous(input_pos);
  const int64_t* positions = (const int64_t*)pos.data_ptr();
  if (q.scalar_type() == ScalarType::Float)
    attend_all<Wide, float>(q, keys, values, positions, y);
  else
    attend_all<Half, bf16>(q, keys, values, positions, y);
  return y;
}

// ---- layers in one call: what lies between two products is too little to go back to Python for

template <typename E>
static inline Floats rounded(Floats x) {
  E y[LANES];
  store(x, y);
  return load(y);
}

// to (rows, D) = x / sqrt(mean of x^2 + eps) * weight
template <typename E>
static void normalize(const E* x, const E* weight, float eps, int64_t rows, int64_t D, E* to) {
  for (; rows > 0; rows--, x += D, to += D) {
    Floats squares = {};
    for (int64_t i = 0; i < D; i += LANES) squares += load(x + i) * load(x + i);
    const float scale = 1 / std::sqrt(add_up(squares) / D + eps);
    for (int64_t i = 0; i < D; i += LANES) store(rounded<E>(load(x + i) * scale) * load(weight + i), to + i);
  }
}

// to (d,) = x with each pair (x[i], x[i + d / 2]) turned by its angle
template <typename E>
static void turn(const E* x, const float* cos, const float* sin, int64_t d, E* to) {
  for (int64_t i = 0; i < d / 2; i++) {
    const float first = widen(x[i]), second = widen(x[i + d / 2]);
    store(first * cos[i] - second * sin[i], to + i);
    store(second * cos[i + d / 2] + first * sin[i + d / 2], to + i + d / 2);
  }
}

// to (rows, F) = SiLU of the first half of both (rows, 2 F), times the second
template <typename E>
static void gate(const E* both, int64_t rows, int64_t F, E* to) {
  for (; rows > 0; rows--, both += 2 * F, to += F)
    for (int64_t i = 0; i < F; i += LANES) {
      const Floats x = load(both + i), e = exponential(x < 0.0f ? x : -x);  // x sigmoid(x), without an overflow
      store(rounded<E>(x * (x < 0.0f ? e : Floats{} + 1.0f) / (e + 1.0f)) * load(both + F + i), to + i);
    }
}

template <typename E>
static void add(const std::vector<E>& y, E* x) {
  for (size_t i = 0; i < y.size(); i += LANES) store(load(x + i) + load(&y[i]), x + i);
}

typedef std::vector<Tensor> Matrix;  // the weight (N, K) alone, or its codes, scales and perhaps zeros

struct Weights {
  Tensor norm1, norm2;
  Matrix wqkv, wo, w13, w2;
  bool exact;
};

// The layer that model.py's Block is, rounded at the same places. x becomes its output.
template <typename How, typename E>
static void layer_of(Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& input_pos, Tensor& keys, Tensor& values,
                     const Weights& weights, int64_t H, int64_t F, float eps) {
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), rows = B * T, G = keys.size(1), d = keys.size(3), all = H + 2 * G;
  E *X = (E*)x.data_ptr(), *K = (E*)keys.data_ptr(), *V = (E*)values.data_ptr();
  Tensor q = torch::stable::new_empty(x, {B, T, H, d}), context = torch::stable::new_empty(x, {B, T, H, d});
  std::vector<E> normal(rows * D), heads(rows * all * d), y(rows * D), both(rows * 2 * F), hidden(rows * F);
  const int64_t* positions = (const int64_t*)input_pos.data_ptr();
  const auto product = [&](const E* from, const Matrix& weight, E* to, int64_t N, int64_t width) {
    if (weight.size() > 1) return multiply_any(from, Codes(weight), to, rows, N, width, weights.exact);
    multiply_all<How>(from, (const E*)weight[0].data_ptr(), to, rows, N, width, weight[0].stride(0));
  };

  normalize(X, (const E*)weights.norm1.data_ptr(), eps, rows, D, normal.data());
  product(normal.data(), weights.wqkv, heads.data(), all * d, D);
  for (int64_t row = 0; row < rows; row++) {
    const float *c = (const float*)cos.data_ptr() + row * d, *s = (const float*)sin.data_ptr() + row * d;
    const E* from = heads.data() + row * all * d;
    for (int64_t h = 0; h < H; h++, from += d) turn(from, c, s, d, (E*)q.data_ptr() + (row * H + h) * d);
    for (int64_t g = 0; g < G; g++, from += d)
      turn(from, c, s, d, K + row / T * keys.stride(0) + g * keys.stride(1) + positions[row] * keys.stride(2));
    for (int64_t g = 0; g < G; g++, from += d)
      std::copy(from, from + d, V + row / T * values.stride(0) + g * values.stride(1) + positions[row] * values.stride(2));
  }
  attend_all<How, E>(q, keys, values, positions, context);
  product((const E*)context.data_ptr(), weights.wo, y.data(), D, H * d);
  add(y, X);
  normalize(X, (const E*)weights.norm2.data_ptr(), eps, rows, D, normal.data());
  product(normal.data(), weights.w13, both.data(), 2 * F, D);
  gate(both.data(), rows, F, hidden.data());
  product(hidden.data(), weights.w2, y.data(), D, F);
  add(y, X);
}

// Each layer in turn makes of x (B, T, D) its output. keys and values: of each layer (B, G, S, d); cos and sin (B, T, 1, d);
// weights: of each layer norm1, wqkv, wo, norm2, w13 and w2, a matrix being one tensor or its two or three; H heads, F hidden
Tensor layers(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& input_pos, std::vector<Tensor> keys,
              std::vector<Tensor> values, std::vector<Tensor> weights, int64_t H, int64_t F, double eps, bool exact) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 3 && !keys.empty() && keys.size() == values.size(), "x has 3 dimensions, and each layer a cache");
  for (size_t l = 0; l < keys.size(); l++) check_attention(x.size(0), x.size(1), keys[l], values[l], input_pos, type);
  const int64_t D = x.size(2), G = keys[0].size(1), d = keys[0].size(3);
  const char* const unfit = "the weights of the layers don't fit each other";
  STD_TORCH_CHECK(H > 0 && H % G == 0 && F > 0 && D % 16 == 0 && F % 16 == 0, unfit);
  for (const Tensor* table : {&cos, &sin})
    STD_TORCH_CHECK(table->numel() == x.size(0) * x.size(1) * d && table->scalar_type() == ScalarType::Float,
                    "cos and sin must be (B, T, 1, d), float32");

  size_t at = 0;
  const auto next = [&]() -> const Tensor& {
    STD_TORCH_CHECK(at < weights.size(), unfit);
    return weights[at++];
  };
  const auto norm = [&]() -> const Tensor& {
    const Tensor& weight = next();
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == D && weight.is_contiguous() && weight.scalar_type() == type, unfit);
    return weight;
  };
  const auto matrix = [&](int64_t N, int64_t K) {
    Matrix parts{next()};
    const bool codes = parts[0].scalar_type() == ScalarType::Byte;
    while (codes && at < weights.size() && weights[at].dim() == 3 && weights[at].scalar_type() != ScalarType::Byte)
      parts.push_back(next());
    if (codes) check_codes(parts, N, K);
    else
      STD_TORCH_CHECK(parts[0].dim() == 2 && parts[0].size(0) == N && parts[0].size(1) == K && parts[0].stride(1) == 1 &&
                          parts[0].scalar_type() == type, unfit);
    return parts;
  };
  std::vector<Weights> all;
  for (size_t l = 0; l < keys.size(); l++) {  // in the order in which a layer needs them
    STD_TORCH_CHECK(keys[l].size(1) == G && keys[l].size(3) == d, "the caches of the layers differ in shape");
    const Tensor& norm1 = norm();
    Matrix wqkv = matrix((H + 2 * G) * d, D), wo = matrix(D, H * d);
    const Tensor& norm2 = norm();
    Matrix w13 = matrix(2 * F, D), w2 = matrix(D, F);
    all.push_back({norm1, norm2, wqkv, wo, w13, w2, exact});
  }
  STD_TORCH_CHECK(at == weights.size(), unfit);

  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), D});
  if (y.numel() == 0) return y;
  torch::stable::copy_(y, x);
  const Tensor c = torch::stable::contiguous(cos), s = torch::stable::contiguous(sin);
  const Tensor pos = torch::stable::contiguous(input_pos);
  for (size_t l = 0; l < keys.size(); l++) {
    if (type == ScalarType::Float)
      layer_of<Wide, float>(y, c, s, pos, keys[l], values[l], all[l], H, F, eps);
    else
      layer_of<Half, bf16>(y, c, s, pos, keys[l], values[l], all[l], H, F, eps);
  }
  return y;
}

// ---- the limit: reads all of x once, in one stream per thread, and does next to nothing with it

Tensor read_all(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "only contiguous memory can be read through");
  const char* from = (const char*)x.data_ptr();
  const int64_t step = 4 * sizeof(Ints), count = x.numel() * x.element_size() / step;
  const int64_t threads = torch::stable::get_num_threads(), share = count / threads + 1;
  Tensor y = torch::stable::new_empty(x, {1}, ScalarType::Int);
  std::vector<Ints> sums(threads);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      Ints sum[4] = {};
      for (int64_t i = thread * share; i < std::min(count, (thread + 1) * share); i++) {
        Ints part[4];
        std::memcpy(part, from + i * step, step);
        for (int j = 0; j < 4; j++) sum[j] += part[j];
      }
      sums[thread] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  });
  Ints all = {};
  for (const Ints& sum : sums) all += sum;
  int32_t answer = 0;
  for (int i = 0; i < LANES; i++) answer ^= all[i];
  *(int32_t*)y.data_ptr() = answer;
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llamabook, m) {
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor keys, Tensor values, Tensor input_pos) -> Tensor");
  m.def("quantized_linear(Tensor x, Tensor[] weight, int N, bool exact) -> Tensor");
  m.def("layers(Tensor x, Tensor cos, Tensor sin, Tensor input_pos, Tensor(a!)[] keys, Tensor(b!)[] values, "
        "Tensor[] weights, int H, int F, float eps, bool exact) -> Tensor");
  m.def("rounds() -> bool");
  m.def("read_all(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llamabook, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("layers", TORCH_BOX(&layers));
  m.impl("read_all", TORCH_BOX(&read_all));
}

STABLE_TORCH_LIBRARY_IMPL(llamabook, CompositeExplicitAutograd, m) {
  m.impl("rounds", TORCH_BOX(&rounds));
}
