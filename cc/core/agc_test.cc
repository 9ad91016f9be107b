// The arithmetic against plain loops in double: every instruction-set level that this machine runs, every type, layout
// and activation, odd sizes, in place and not, threads in any order. What needs TensorFlow is tested from Python.

#include "cc/core/agc.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cc/core/cpu.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace {

std::vector<InstructionSet> Levels() {
  std::vector<InstructionSet> levels;
  for (InstructionSet level : {InstructionSet::kBaseline, InstructionSet::kX86_64_V2, InstructionSet::kX86_64_V3,
                               InstructionSet::kX86_64_V4}) {
    const bool x86 = BestInstructionSet() != InstructionSet::kBaseline;
    if (level <= BestInstructionSet() && (level != InstructionSet::kBaseline) == x86) levels.push_back(level);
  }
  return levels;
}

// ---- Elements of type T as bytes ----

size_t Bytes(DataType type) { return type == DataType::kDouble ? 8 : type == DataType::kFloat ? 4 : 2; }

double HalfToDouble(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// The nearest value of 16 bits, ties to even, by search: slow and obviously right. Finite values only.
uint16_t Nearest16(double value, double (*decode)(uint16_t), uint16_t infinity) {
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

double Bfloat16ToDouble(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return static_cast<double>(f);
}

class Array {
 public:
  Array(DataType type, size_t size) : type_(type), bytes_(Bytes(type) * size + kPadding, 0x5a) {}

  // One element off any alignment that a vector might want.
  char* data() { return bytes_.data() + Bytes(type_); }
  size_t size() const { return (bytes_.size() - kPadding) / Bytes(type_); }

  double Get(size_t i) const {
    const char* p = bytes_.data() + Bytes(type_) * (i + 1);
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
    char* p = bytes_.data() + Bytes(type_) * (i + 1);
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
    for (size_t i = 0; i < Bytes(type_); ++i) {
      if (bytes_[i] != 0x5a) return false;
    }
    for (size_t i = bytes_.size() - kPadding + Bytes(type_); i < bytes_.size(); ++i) {
      if (bytes_[i] != 0x5a) return false;
    }
    return true;
  }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr size_t kPadding = 128;
  DataType type_;
  std::vector<char> bytes_;
};

DataType ParameterType(DataType type) { return type == DataType::kDouble ? DataType::kDouble : DataType::kFloat; }

// One unit in the last place of 1.
double Epsilon(DataType type) {
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

double Act(Activation a, double alpha, double z) {
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
double Slope(Activation a, double alpha, double y) {
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
double Inverse(Activation a, double alpha, double y) {
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
           " activation=" + std::to_string(static_cast<int>(activation));
  }
};

struct Tensors {
  Array x, gain, mean_scale, y, mean, dy, dmean, dx, dgain, dmean_scale;

  explicit Tensors(const Case& c)
      : x(c.type, c.size()),
        gain(ParameterType(c.type), c.channels()),
        mean_scale(ParameterType(c.type), c.channels()),
        y(c.type, c.size()),
        mean(ParameterType(c.type), c.maps()),
        dy(c.type, c.size()),
        dmean(ParameterType(c.type), c.maps()),
        dx(c.type, c.size()),
        dgain(ParameterType(c.type), c.channels()),
        dmean_scale(ParameterType(c.type), c.channels()) {
    std::mt19937 random(static_cast<unsigned>(c.size()) * 31u + static_cast<unsigned>(c.channels()));
    std::normal_distribution<double> normal(0.3, 1.5);
    auto fill = [&](Array* a) {
      for (size_t i = 0; i < a->size(); ++i) a->Set(i, normal(random));
    };
    for (Array* a : {&x, &mean_scale, &dy, &dmean}) fill(a);
    for (size_t i = 0; i < gain.size(); ++i) gain.Set(i, (i % 3 == 0 ? -1 : 1) * (0.5 + std::abs(normal(random))));
  }

  void RunForward(const Case& c, bool in_place, const Parallel& parallel, InstructionSet level) {
    if (in_place) y = x;
    Forward({c.shape, c.type, c.activation, c.alpha, in_place ? y.data() : x.data(), gain.data(), mean_scale.data(),
             y.data(), mean.data()},
            parallel, level);
  }
  // over: 0 a fresh dx, 1 over dy, 2 over what was kept.
  void RunBackward(const Case& c, int over, const Parallel& parallel, InstructionSet level) {
    Array& kept = c.activation == Activation::kLinear ? x : y;
    if (over == 1) dx = dy;
    if (over == 2) dx = kept;
    Backward({c.shape, c.type, c.activation, c.alpha, over == 1 ? dx.data() : dy.data(), dmean.data(),
              over == 2 ? dx.data() : kept.data(), mean.data(), gain.data(), mean_scale.data(), dx.data(), dgain.data(),
              dmean_scale.data()},
             parallel, level);
  }
};

void CheckForward(const Case& c, const Tensors& t) {
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
        const double y = Act(c.activation, c.alpha, gain * (t.x.Get(c.Index(n, p, ch)) - scale * mean));
        // Rounding of the result, and of the arithmetic before it.
        const double tolerance =
            Epsilon(c.type) * std::abs(y) + 8 * u * std::abs(gain) * (1 + std::abs(scale)) * largest;
        ASSERT_NEAR(t.y.Get(c.Index(n, p, ch)), y, tolerance + 0x1p-24 * (c.type == DataType::kHalf)) << c.Name();
      }
    }
  }
}

void CheckBackward(const Case& c, const Tensors& t) {
  const double u = Epsilon(ParameterType(c.type));
  const double positions = static_cast<double>(c.shape.positions);
  for (int64_t ch = 0; ch < c.shape.channels; ++ch) {
    const double gain = t.gain.Get(static_cast<size_t>(ch)), scale = t.mean_scale.Get(static_cast<size_t>(ch));
    double dgain = 0, dmean_scale = 0, gain_terms = 0, scale_terms = 0;
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
        const double difference = c.activation == Activation::kLinear
                                      ? t.x.Get(i) - scale * mean
                                      : Inverse(c.activation, c.alpha, t.y.Get(i)) / gain;
        sum += dz;
        // Not |dz|: elu's slope y + alpha is the small difference of two rounded numbers.
        const double scale_of_dz = std::abs(t.dy.Get(i)) * std::max(1.0, c.alpha);
        largest = std::max(largest, scale_of_dz);
        dgain += dz * difference;
        gain_terms += scale_of_dz * (std::abs(difference) + std::abs(scale * mean));
      }
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
  }
}

const Activation kActivations[] = {Activation::kLinear, Activation::kRelu, Activation::kRelu6, Activation::kLeakyRelu,
                                   Activation::kElu};
const DataType kTypes[] = {DataType::kHalf, DataType::kBfloat16, DataType::kFloat, DataType::kDouble};
const Layout kLayouts[] = {Layout::kChannelsLast, Layout::kChannelsFirst};

double AlphaOf(Activation a) { return a == Activation::kLeakyRelu ? 0.2 : a == Activation::kElu ? 1.3 : 0; }

// Real threads, one a task, started from the last to the first: nothing may depend on the order.
Parallel Backwards(int threads) {
  auto run = [](void*, int64_t tasks, int64_t, void (*task)(const void*, int64_t), const void* context) {
    for (int64_t i = tasks - 1; i >= 0; i -= 2) {
      std::thread other([&] { task(context, i); });
      if (i > 0) task(context, i - 1);
      other.join();
    }
  };
  return {threads, nullptr, run};
}

class EverySize : public testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(EverySize, EqualsPlainLoops) {
  const auto [batch, positions, channels] = GetParam();
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      for (DataType type : kTypes) {
        for (Activation activation : kActivations) {
          const Case c{{batch, positions, channels, layout}, type, activation, AlphaOf(activation)};
          Tensors t(c);
          t.RunForward(c, /*in_place=*/false, Serial(), level);
          CheckForward(c, t);
          t.RunBackward(c, /*over=*/0, Serial(), level);
          CheckBackward(c, t);
          if (HasFatalFailure()) return;

          Tensors in_place(c);
          in_place.RunForward(c, /*in_place=*/true, Backwards(8), level);
          ASSERT_TRUE(in_place.y == t.y && in_place.mean == t.mean) << c.Name();
          for (int over : {1, 2}) {
            in_place.RunBackward(c, over, Backwards(8), level);
            ASSERT_TRUE(in_place.dx == t.dx) << c.Name() << " over " << over;
            ASSERT_TRUE(in_place.dgain == t.dgain && in_place.dmean_scale == t.dmean_scale) << c.Name();
          }
          for (const Array* a : {&t.y, &t.mean, &t.dx, &t.dgain, &t.dmean_scale, &in_place.y, &in_place.dx}) {
            ASSERT_TRUE(a->BordersIntact()) << c.Name();
          }
        }
      }
    }
  }
}

// Below and above a vector, a fold, a tree of rows, a block of rows, a task's channels; primes.
INSTANTIATE_TEST_SUITE_P(Sizes, EverySize,
                         testing::Values(std::make_tuple(2, 1, 1), std::make_tuple(3, 7, 1), std::make_tuple(1, 300, 2),
                                         std::make_tuple(2, 49, 3), std::make_tuple(2, 5, 15),
                                         std::make_tuple(1, 131, 16), std::make_tuple(3, 9, 17),
                                         std::make_tuple(2, 67, 33), std::make_tuple(2, 8, 48),
                                         std::make_tuple(1, 25, 64), std::make_tuple(2, 13, 101),
                                         std::make_tuple(1, 4, 513), std::make_tuple(1, 3, 1033)));

// Maps of several chunks, shared by threads and not: also where whole maps are walked one chunk after the other.
INSTANTIATE_TEST_SUITE_P(Chunks, EverySize,
                         testing::Values(std::make_tuple(1, 70001, 1), std::make_tuple(1, 2113, 37)));

TEST(Forward, SampleDoesNotDependOnItsNeighbours) {
  for (Layout layout : kLayouts) {
    const Case many{{5, 2113, 37, layout}, DataType::kFloat, Activation::kRelu, 0};
    Case one = many;
    one.shape.batch = 1;
    Tensors all(many), single(one);
    for (size_t i = 0; i < single.x.size(); ++i) single.x.Set(i, all.x.Get(i + 3 * single.x.size()));
    single.gain = all.gain;
    single.mean_scale = all.mean_scale;
    all.RunForward(many, false, Serial(), BestInstructionSet());
    single.RunForward(one, false, Backwards(8), BestInstructionSet());
    for (size_t i = 0; i < single.y.size(); ++i) ASSERT_EQ(single.y.Get(i), all.y.Get(i + 3 * single.y.size()));
  }
}

TEST(Backward, GroupsOfSamplesAddUp) {
  for (Layout layout : kLayouts) {
    const Case c{{201, 6, 5, layout}, DataType::kFloat, Activation::kRelu, 0};
    Tensors t(c);
    t.RunForward(c, false, Serial(), BestInstructionSet());
    t.RunBackward(c, 0, Backwards(3), BestInstructionSet());
    CheckForward(c, t);
    CheckBackward(c, t);
  }
}

TEST(Forward, MeanOfManyLargeValues) {
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      const Case c{{1, 1000000, 1, layout}, DataType::kFloat, Activation::kLinear, 0};
      Tensors t(c);
      double sum = 0;
      for (size_t i = 0; i < t.x.size(); ++i) {
        t.x.Set(i, 1000 + t.x.Get(i));
        sum += t.x.Get(i);
      }
      t.RunForward(c, false, Serial(), level);
      EXPECT_NEAR(t.mean.Get(0), sum / 1e6, 1000 * 2 * 0x1p-23);
    }
  }
}

TEST(Forward, HalfSumsDoNotOverflow) {
  for (InstructionSet level : Levels()) {
    const Case c{{1, 1000, 3, Layout::kChannelsLast}, DataType::kHalf, Activation::kLinear, 0};
    Tensors t(c);
    for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, 60000);
    t.RunForward(c, false, Serial(), level);
    EXPECT_EQ(t.mean.Get(1), HalfToDouble(0x7b53));  // The half nearest to 60000.
  }
}

TEST(Forward, HalfRoundsLikeTheStandardSays) {
  // gain * x with every exponent that matters: denormal, normal, overflowing. P = 1 and mean_scale = 0 make y = gain *
  // x.
  for (InstructionSet level : Levels()) {
    for (DataType type : {DataType::kHalf, DataType::kBfloat16}) {
      const Case c{{1, 1, 4099, Layout::kChannelsLast}, type, Activation::kLinear, 0};
      Tensors t(c);
      std::mt19937 random(7);
      std::uniform_real_distribution<double> exponent(-28, 17), mantissa(1, 2);
      for (size_t i = 0; i < t.x.size(); ++i) {
        t.x.Set(i, i % 2 ? 1 : -1);
        t.gain.Set(i, std::ldexp(mantissa(random), static_cast<int>(exponent(random))));
        t.mean_scale.Set(i, 0);
      }
      t.gain.Set(0, 65519);      // The last that rounds to the largest half.
      t.gain.Set(1, 65520);      // The first that rounds to infinity: a tie.
      t.gain.Set(2, 0x1.002p0);  // A tie, to even.
      t.gain.Set(3, 0x1.006p0);
      Array expected = t.y;
      for (size_t i = 0; i < t.x.size(); ++i) expected.Set(i, t.x.Get(i) * t.gain.Get(i));
      t.RunForward(c, false, Serial(), level);
      for (size_t i = 0; i < t.x.size(); ++i) ASSERT_EQ(t.y.Get(i), expected.Get(i)) << t.gain.Get(i);
    }
  }
}

TEST(Forward, NanAndInfinityGoThrough) {
  const double inf = std::numeric_limits<double>::infinity();
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      for (DataType type : {DataType::kFloat, DataType::kDouble}) {
        for (Activation activation : kActivations) {
          const Case c{{3, 37, 19, layout}, type, activation, AlphaOf(activation)};
          Tensors t(c);
          t.x.Set(c.Index(0, 11, 3), std::nan(""));
          t.x.Set(c.Index(1, 12, 4), inf);
          t.RunForward(c, false, Serial(), level);
          t.RunBackward(c, 0, Serial(), level);
          for (int64_t p = 0; p < 37; ++p) {
            EXPECT_TRUE(std::isnan(t.y.Get(c.Index(0, p, 3)))) << c.Name();
            EXPECT_FALSE(std::isnan(t.y.Get(c.Index(0, p, 4)))) << c.Name();
            EXPECT_FALSE(std::isnan(t.y.Get(c.Index(2, p, 3)))) << c.Name();
          }
          EXPECT_TRUE(std::isnan(t.mean.Get(3)));
          EXPECT_EQ(t.mean.Get(19 + 4), inf);
          EXPECT_TRUE(std::isnan(t.y.Get(c.Index(1, 12, 4)))) << c.Name();  // Infinity minus infinity.
          EXPECT_TRUE(std::isnan(t.dgain.Get(3))) << c.Name();
          EXPECT_FALSE(std::isnan(t.dgain.Get(5))) << c.Name();
        }
      }
    }
  }
}

TEST(Bfloat16, NanOfAnyBitsStaysNan) {
  // Rounding these bits by adding to them would carry into the sign.
  const uint32_t bits = 0x7fffffff;
  float nan;
  std::memcpy(&nan, &bits, 4);
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      const Case c{{2, 37, 19, layout}, DataType::kBfloat16, Activation::kLinear, 0};
      Tensors t(c);
      std::memcpy(t.gain.data() + 4 * 3, &nan, 4);
      std::memcpy(t.mean_scale.data() + 4 * 5, &nan, 4);
      std::memcpy(t.dmean.data() + 4 * 7, &nan, 4);
      t.RunForward(c, false, Serial(), level);
      t.RunBackward(c, 0, Serial(), level);
      for (int64_t p = 0; p < 37; ++p) {
        EXPECT_TRUE(std::isnan(t.y.Get(c.Index(0, p, 3)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.y.Get(c.Index(1, p, 5)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.dx.Get(c.Index(0, p, 3)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.dx.Get(c.Index(1, p, 5)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.dx.Get(c.Index(0, p, 7)))) << c.Name();
        EXPECT_FALSE(std::isnan(t.dx.Get(c.Index(1, p, 7)))) << c.Name();
      }
    }
  }
}

TEST(Backward, InfiniteGradientIsSeenEvenWhereReluIsDead) {
  for (InstructionSet level : Levels()) {
    const Case c{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, Activation::kRelu, 0};
    Tensors t(c);
    t.RunForward(c, false, Serial(), level);
    size_t dead = 0;
    while (t.y.Get(dead) > 0) ++dead;
    t.dy.Set(dead, std::numeric_limits<double>::infinity());
    t.RunBackward(c, 0, Serial(), level);
    EXPECT_FALSE(std::isfinite(t.dx.Get(dead)));
    EXPECT_FALSE(std::isfinite(t.dgain.Get(dead % 19)));
  }
}

TEST(Backward, ZeroGainGivesNumbers) {
  for (InstructionSet level : Levels()) {
    for (Activation activation : kActivations) {
      const Case c{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, activation, AlphaOf(activation)};
      Tensors t(c);
      t.gain.Set(5, 0);
      t.gain.Set(6, 0x1p-149);
      t.RunForward(c, false, Serial(), level);
      t.RunBackward(c, 0, Serial(), level);
      if (activation != Activation::kLinear) {
        EXPECT_EQ(t.dgain.Get(5), 0) << c.Name();
      } else {
        EXPECT_NE(t.dgain.Get(5), 0);
      }
      EXPECT_TRUE(std::isfinite(t.dgain.Get(6))) << c.Name();
      EXPECT_EQ(t.dmean_scale.Get(5), 0);
    }
  }
}

TEST(Backward, EluAtItsFloor) {
  for (InstructionSet level : Levels()) {
    for (DataType type : kTypes) {
      const Case c{{1, 40, 2, Layout::kChannelsLast}, type, Activation::kElu, 0.3};
      Tensors t(c);
      for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, i % 4 < 2 ? -200 : 200);
      t.RunForward(c, false, Serial(), level);
      t.RunBackward(c, 0, Serial(), level);
      EXPECT_TRUE(std::isfinite(t.dgain.Get(0)) && std::isfinite(t.dgain.Get(1))) << c.Name();
    }
  }
}

TEST(Forward, DenormalsAreKeptAndTheControlRegisterIsRestored) {
  const Case c{{1, 64, 16, Layout::kChannelsLast}, DataType::kFloat, Activation::kRelu, 0};
  Tensors t(c);
  for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, (i / 16) % 2 ? 0x1p-140 : 0);
  t.gain.Set(1, 1);
  t.mean_scale.Set(1, 1);
  t.RunForward(c, false, Serial(), BestInstructionSet());
  EXPECT_EQ(t.y.Get(17), 0x1p-141);
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  t.y = t.x;
  t.RunForward(c, false, Serial(), BestInstructionSet());
  const unsigned after = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before);
  EXPECT_EQ(t.y.Get(17), 0x1p-141);
  EXPECT_EQ(after & 0x8040u, 0x8040u);
#endif
}

TEST(Empty, BatchAndChannels) {
  for (Layout layout : kLayouts) {
    const Case no_samples{{0, 5, 3, layout}, DataType::kFloat, Activation::kRelu, 0};
    Tensors t(no_samples);
    t.RunForward(no_samples, false, Serial(), BestInstructionSet());
    t.RunBackward(no_samples, 0, Serial(), BestInstructionSet());
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(t.dgain.Get(i), 0);
      EXPECT_EQ(t.dmean_scale.Get(i), 0);
    }
    const Case no_channels{{2, 5, 0, layout}, DataType::kFloat, Activation::kRelu, 0};
    Tensors none(no_channels);
    none.RunForward(no_channels, false, Serial(), BestInstructionSet());
    none.RunBackward(no_channels, 0, Serial(), BestInstructionSet());
    EXPECT_TRUE(none.y.BordersIntact() && none.dgain.BordersIntact());
  }
}

TEST(Alpha, ZeroActsAsRelu) {
  for (Activation activation : {Activation::kLeakyRelu, Activation::kElu}) {
    const Case with_alpha{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, activation, 0};
    Case relu = with_alpha;
    relu.activation = Activation::kRelu;
    Tensors a(with_alpha), b(relu);
    a.RunForward(with_alpha, false, Serial(), BestInstructionSet());
    a.RunBackward(with_alpha, 0, Serial(), BestInstructionSet());
    b.RunForward(relu, false, Serial(), BestInstructionSet());
    b.RunBackward(relu, 0, Serial(), BestInstructionSet());
    EXPECT_TRUE(a.y == b.y && a.dx == b.dx && a.dgain == b.dgain);
  }
}

TEST(Cpu, NamesAndCache) {
  EXPECT_STREQ(InstructionSetName(InstructionSet::kX86_64_V3), "x86-64-v3");
  EXPECT_GT(L2CacheBytes(), 16 * 1024);
  EXPECT_GE(L3CacheBytes(), 0);
}

}  // namespace
}  // namespace core
}  // namespace tf_agc
