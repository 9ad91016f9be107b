// For tests of the arithmetic, on the CPU and in CUDA: arrays of every type, one call's tensors, and the plain loops in
// double that results are compared with.

#ifndef TF_AGC_CC_CORE_AGC_TEST_UTIL_H_
#define TF_AGC_CC_CORE_AGC_TEST_UTIL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cc/core/agc.h"
#include "cc/core/cpu.h"
#include "cc/core/scheduling.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {

// ---- Elements of type T as bytes ----

inline size_t Bytes(DataType type) { return static_cast<size_t>(ElementBytes(type)); }

inline double HalfToDouble(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// The nearest value of 16 bits, ties to even, by search: slow and obviously right. Not for NaN.
inline uint16_t Nearest16(double value, double (*decode)(uint16_t), uint16_t infinity) {
  if (std::isinf(value)) return static_cast<uint16_t>(infinity | (value < 0 ? 0x8000 : 0));
  uint16_t low = 0, high = infinity;  // Positive values are ordered as their bits.
  const double magnitude = std::abs(value);
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (decode(middle) <= magnitude ? low : high) = middle;
  }
  // What would follow the largest finite value decides whether to round to infinity.
  const double above = high == infinity ? 2 * decode(low) - decode(static_cast<uint16_t>(low - 1)) : decode(high);
  const double down = magnitude - decode(low), up = above - magnitude;
  const bool take_high = up < down || (up == down && low % 2 == 1);
  return static_cast<uint16_t>((take_high ? high : low) | (std::signbit(value) ? 0x8000 : 0));
}

inline double Bfloat16ToDouble(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return static_cast<double>(f);
}

class Array {
 public:
  // By default one element off any alignment that a vector might want.
  Array(DataType type, size_t size, bool aligned = false)
      : type_(type), before_(aligned ? kAlignment : Bytes(type)), bytes_(Bytes(type) * size + kPadding, 0x5a) {}

  char* data() { return bytes_.data() + before_; }
  size_t size() const { return (bytes_.size() - kPadding) / Bytes(type_); }

  double Get(size_t i) const {
    const char* p = bytes_.data() + before_ + Bytes(type_) * i;
    uint16_t u;
    float f;
    double d;
    switch (type_) {
      case DataType::kHalf:
        std::memcpy(&u, p, 2);
        return HalfToDouble(u);
      case DataType::kBfloat16:
        std::memcpy(&u, p, 2);
        return Bfloat16ToDouble(u);
      case DataType::kFloat:
        std::memcpy(&f, p, 4);
        return static_cast<double>(f);
      default:
        std::memcpy(&d, p, 8);
        return d;
    }
  }
  void Set(size_t i, double value) {
    char* p = data() + Bytes(type_) * i;
    const float f = static_cast<float>(value);
    uint16_t u;
    switch (type_) {
      case DataType::kHalf:
        u = Nearest16(value, HalfToDouble, 0x7c00);
        std::memcpy(p, &u, 2);
        break;
      case DataType::kBfloat16:
        u = Nearest16(value, Bfloat16ToDouble, 0x7f80);
        std::memcpy(p, &u, 2);
        break;
      case DataType::kFloat:
        std::memcpy(p, &f, 4);
        break;
      default:
        std::memcpy(p, &value, 8);
    }
  }
  // Whether the bytes before and behind the elements are as they were.
  bool BordersIntact() const {
    for (size_t i = 0; i < before_; ++i) {
      if (bytes_[i] != 0x5a) return false;
    }
    for (size_t i = bytes_.size() - kPadding + before_; i < bytes_.size(); ++i) {
      if (bytes_[i] != 0x5a) return false;
    }
    return true;
  }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr size_t kPadding = 128, kAlignment = 16;  // The latter is also what std::vector gives.
  DataType type_;
  size_t before_;  // Bytes.
  std::vector<char> bytes_;
};

inline DataType ParameterType(DataType type) {
  return type == DataType::kDouble ? DataType::kDouble : DataType::kFloat;
}

// One unit in the last place of 1.
inline double Epsilon(DataType type) {
  switch (type) {
    case DataType::kHalf:
      return 0x1p-10;
    case DataType::kBfloat16:
      return 0x1p-7;
    case DataType::kFloat:
      return 0x1p-23;
    default:
      return 0x1p-52;
  }
}

inline double Act(Activation a, double alpha, double z) {
  switch (a) {
    case Activation::kRelu:
      return z < 0 ? 0 : z;
    case Activation::kRelu6:
      return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::kLeakyRelu:
      return z > 0 ? z : alpha * z;
    case Activation::kElu:
      return z > 0 ? z : alpha * std::expm1(z);
    default:
      return z;
  }
}

// act'(z) and z out of y.
inline double Slope(Activation a, double alpha, double y) {
  switch (a) {
    case Activation::kRelu:
      return y > 0;
    case Activation::kRelu6:
      return y > 0 && y < 6;
    case Activation::kLeakyRelu:
      return y > 0 ? 1 : alpha;
    case Activation::kElu:
      return y > 0 ? 1 : std::max(y + alpha, 0.0);
    default:
      return 1;
  }
}
inline double Inverse(Activation a, double alpha, double y) {
  if (a == Activation::kLeakyRelu && y <= 0) return alpha == 0 ? 0 : y / alpha;
  if (a == Activation::kElu && y <= 0) return y + alpha <= 0 ? 0 : std::log1p(y / alpha);
  return y;
}

// ---- A call and its reference ----

struct Case {
  Shape shape;
  DataType type;
  Activation activation;
  double alpha;
  bool bias = false;
  bool shortcut = false;

  // The backward call of kLinear has no shortcut.
  bool BackwardShortcut() const { return shortcut && activation != Activation::kLinear; }

  size_t size() const { return static_cast<size_t>(shape.batch * shape.positions * shape.channels); }
  size_t maps() const { return static_cast<size_t>(shape.batch * shape.channels); }
  size_t channels() const { return static_cast<size_t>(shape.channels); }
  size_t Index(int64_t n, int64_t p, int64_t c) const {
    return static_cast<size_t>(shape.layout == Layout::kChannelsLast ? (n * shape.positions + p) * shape.channels + c
                                                                     : (n * shape.channels + c) * shape.positions + p);
  }
  std::string Name() const {
    return "N=" + std::to_string(shape.batch) + " P=" + std::to_string(shape.positions) +
           " C=" + std::to_string(shape.channels) + " layout=" + std::to_string(static_cast<int>(shape.layout)) +
           " type=" + std::to_string(static_cast<int>(type)) +
           " activation=" + std::to_string(static_cast<int>(activation)) + (bias ? " bias" : "") +
           (shortcut ? " shortcut" : "");
  }
};

struct Tensors {
  Array x, gain, mean_scale, bias, shortcut, y, mean, dy, dmean, dx, dgain, dmean_scale, dbias, dshortcut;

  // `aligned`: whether the maps are.
  explicit Tensors(const Case& c, bool aligned = false)
      : x(c.type, c.size(), aligned),
        gain(ParameterType(c.type), c.channels()),
        mean_scale(ParameterType(c.type), c.channels()),
        bias(ParameterType(c.type), c.channels()),
        shortcut(c.type, c.size(), aligned),
        y(c.type, c.size(), aligned),
        mean(ParameterType(c.type), c.maps()),
        dy(c.type, c.size(), aligned),
        dmean(ParameterType(c.type), c.maps()),
        dx(c.type, c.size(), aligned),
        dgain(ParameterType(c.type), c.channels()),
        dmean_scale(ParameterType(c.type), c.channels()),
        dbias(ParameterType(c.type), c.channels()),
        dshortcut(c.type, c.size(), aligned) {
    std::mt19937 random(static_cast<unsigned>(c.size()) * 31u + static_cast<unsigned>(c.channels()));
    std::normal_distribution<double> normal(0.3, 1.5);
    auto fill = [&](Array* a) {
      for (size_t i = 0; i < a->size(); ++i) a->Set(i, normal(random));
    };
    for (Array* a : {&x, &mean_scale, &dy, &dmean}) fill(a);
    for (size_t i = 0; i < gain.size(); ++i) gain.Set(i, (i % 3 == 0 ? -1 : 1) * (0.5 + std::abs(normal(random))));
    for (Array* a : {&bias, &shortcut}) fill(a);
  }

  // The arguments of a call. In place, its input is copied to where the output will be.
  // over: 0 a fresh y, 1 over x, 2 over shortcut.
  ForwardArgs PrepareForward(const Case& c, int over) {
    if (over == 1) y = x;
    if (over == 2) y = shortcut;
    return {c.shape,
            c.type,
            c.activation,
            c.alpha,
            over == 1 ? y.data() : x.data(),
            gain.data(),
            mean_scale.data(),
            y.data(),
            mean.data(),
            c.bias ? bias.data() : nullptr,
            !c.shortcut ? nullptr
            : over == 2 ? y.data()
                        : shortcut.data()};
  }
  // over: 0 fresh gradients, 1 over dy (dshortcut where there is one, else dx), 2 dx over what was kept; with a
  // shortcut also 3, both of these, and 4, dx over shortcut.
  BackwardArgs PrepareBackward(const Case& c, int over) {
    Array& kept = c.activation == Activation::kLinear ? x : y;
    const bool has_shortcut = c.BackwardShortcut();
    Array& over_dy = has_shortcut ? dshortcut : dx;
    if (over == 1 || over == 3) over_dy = dy;
    if (over == 2 || over == 3) dx = kept;
    if (over == 4) dx = shortcut;
    return {c.shape,
            c.type,
            c.activation,
            c.alpha,
            over == 1 || over == 3 ? over_dy.data() : dy.data(),
            dmean.data(),
            over == 2 || over == 3 ? dx.data() : kept.data(),
            mean.data(),
            gain.data(),
            mean_scale.data(),
            dx.data(),
            dgain.data(),
            dmean_scale.data(),
            c.bias ? bias.data() : nullptr,
            !has_shortcut ? nullptr
            : over == 4   ? dx.data()
                          : shortcut.data(),
            c.bias ? dbias.data() : nullptr,
            has_shortcut ? dshortcut.data() : nullptr};
  }

  // What may be added to z before the activation, 0 where it is absent.
  double Bias(const Case& c, int64_t channel) const { return c.bias ? bias.Get(static_cast<size_t>(channel)) : 0; }
  double Shortcut(const Case& c, size_t i) const { return c.shortcut ? shortcut.Get(i) : 0; }
};

inline void CheckForward(const Case& c, const Tensors& t) {
  const double u = Epsilon(ParameterType(c.type));
  for (int64_t n = 0; n < c.shape.batch; ++n) {
    for (int64_t ch = 0; ch < c.shape.channels; ++ch) {
      double sum = 0, largest = 0;
      for (int64_t p = 0; p < c.shape.positions; ++p) {
        const double x = t.x.Get(c.Index(n, p, ch));
        sum += x;
        largest = std::max(largest, std::abs(x));
      }
      const double mean = sum / static_cast<double>(c.shape.positions);
      ASSERT_NEAR(t.mean.Get(static_cast<size_t>(n * c.shape.channels + ch)), mean, 4 * u * largest) << c.Name();
      const double gain = t.gain.Get(static_cast<size_t>(ch)), scale = t.mean_scale.Get(static_cast<size_t>(ch));
      for (int64_t p = 0; p < c.shape.positions; ++p) {
        const double added = t.Bias(c, ch) + t.Shortcut(c, c.Index(n, p, ch));
        const double y = Act(c.activation, c.alpha, gain * (t.x.Get(c.Index(n, p, ch)) - scale * mean) + added);
        // Rounding of the result, and of the arithmetic before it.
        const double tolerance =
            Epsilon(c.type) * std::abs(y) +
            8 * u * (std::abs(gain) * (1 + std::abs(scale)) * largest + std::abs(t.Bias(c, ch)) + std::abs(added));
        ASSERT_NEAR(t.y.Get(c.Index(n, p, ch)), y, tolerance + 0x1p-24 * (c.type == DataType::kHalf)) << c.Name();
      }
    }
  }
}

inline void CheckBackward(const Case& c, const Tensors& t) {
  const double u = Epsilon(ParameterType(c.type));
  const double positions = static_cast<double>(c.shape.positions);
  for (int64_t ch = 0; ch < c.shape.channels; ++ch) {
    const double gain = t.gain.Get(static_cast<size_t>(ch)), scale = t.mean_scale.Get(static_cast<size_t>(ch));
    double dgain = 0, dmean_scale = 0, dbias = 0, gain_terms = 0, scale_terms = 0, bias_terms = 0;
    for (int64_t n = 0; n < c.shape.batch; ++n) {
      const size_t map = static_cast<size_t>(n * c.shape.channels + ch);
      const double mean = t.mean.Get(map);
      auto dz_at = [&](int64_t p) {
        const size_t i = c.Index(n, p, ch);
        return t.dy.Get(i) * Slope(c.activation, c.alpha, t.y.Get(i));
      };
      double sum = 0, largest = 0;
      for (int64_t p = 0; p < c.shape.positions; ++p) {
        const size_t i = c.Index(n, p, ch);
        const double dz = dz_at(p);
        const bool linear = c.activation == Activation::kLinear;
        const double z = Inverse(c.activation, c.alpha, t.y.Get(i));
        const double added = t.Bias(c, ch) + t.Shortcut(c, i);
        const double difference = linear ? t.x.Get(i) - scale * mean : (z - added) / gain;
        const double cancelled =
            linear ? 0 : (std::abs(z) + std::abs(t.Bias(c, ch)) + std::abs(t.Shortcut(c, i))) / std::abs(gain);
        sum += dz;
        // Not |dz|: elu's slope y + alpha is the small difference of two rounded numbers.
        const double scale_of_dz = std::abs(t.dy.Get(i)) * std::max(1.0, c.alpha);
        largest = std::max(largest, scale_of_dz);
        dgain += dz * difference;
        gain_terms += scale_of_dz * (std::abs(difference) + std::abs(scale * mean) + (added == 0 ? 0 : cancelled));
        if (c.BackwardShortcut()) {
          const double tolerance = Epsilon(c.type) * std::abs(dz) + 8 * u * scale_of_dz;
          ASSERT_NEAR(t.dshortcut.Get(i), dz, tolerance + 0x1p-24 * (c.type == DataType::kHalf)) << c.Name();
        }
      }
      dbias += sum;
      bias_terms += largest * positions;
      dmean_scale -= gain * mean * sum;
      scale_terms += std::abs(gain * mean) * largest * positions;
      for (int64_t p = 0; p < c.shape.positions; ++p) {
        const double shift = t.dmean.Get(map) / positions;
        const double dx = gain * (dz_at(p) - scale * sum / positions) + shift;
        const double tolerance = Epsilon(c.type) * std::abs(dx) +
                                 8 * u * (std::abs(gain) * (1 + std::abs(scale)) * largest + std::abs(shift));
        ASSERT_NEAR(t.dx.Get(c.Index(n, p, ch)), dx, tolerance + 0x1p-24 * (c.type == DataType::kHalf)) << c.Name();
      }
    }
    ASSERT_NEAR(t.dgain.Get(static_cast<size_t>(ch)), dgain, 8 * u * gain_terms + 1e-30) << c.Name();
    ASSERT_NEAR(t.dmean_scale.Get(static_cast<size_t>(ch)), dmean_scale, 8 * u * scale_terms + 1e-30) << c.Name();
    if (c.bias) {
      ASSERT_NEAR(t.dbias.Get(static_cast<size_t>(ch)), dbias, 8 * u * bias_terms + 1e-30) << c.Name();
    }
  }
}

const Activation kActivations[] = {Activation::kLinear, Activation::kRelu, Activation::kRelu6, Activation::kLeakyRelu,
                                   Activation::kElu};
const DataType kTypes[] = {DataType::kHalf, DataType::kBfloat16, DataType::kFloat, DataType::kDouble};
const Layout kLayouts[] = {Layout::kChannelsLast, Layout::kChannelsFirst};

inline double AlphaOf(Activation a) { return a == Activation::kLeakyRelu ? 0.2 : a == Activation::kElu ? 1.3 : 0; }

// ---- Ways to run on a CPU ----

// The instruction-set levels that this machine runs.
inline std::vector<InstructionSet> Levels() {
  std::vector<InstructionSet> levels;
  for (InstructionSet level : {InstructionSet::kBaseline, InstructionSet::kX86_64_V2, InstructionSet::kX86_64_V3,
                               InstructionSet::kX86_64_V4}) {
    const bool x86 = BestInstructionSet() != InstructionSet::kBaseline;
    if (level <= BestInstructionSet() && (level != InstructionSet::kBaseline) == x86) levels.push_back(level);
  }
  return levels;
}

// Real threads, one a task, started from the last to the first: nothing may depend on the order.
inline Parallel Backwards(int threads) {
  auto run = [](void*, const Phase* phases, int count) {
    for (const Phase* phase = phases; phase < phases + count; ++phase) {
      for (int64_t i = phase->tasks - 1; i >= 0; i -= 2) {
        std::thread other([&] { phase->task(phase->context, i); });
        if (i > 0) phase->task(phase->context, i - 1);
        other.join();
      }
    }
  };
  return {threads, nullptr, run};
}

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_AGC_TEST_UTIL_H_
