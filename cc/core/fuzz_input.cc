#include "cc/core/fuzz_input.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>

#include "cc/core/agc.h"
#include "cc/core/agc_test_util.h"
#include "cc/core/cpu.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace {

// Elements of a call, at most. The last is enough for maps of several chunks, which threads share; but the plain loops
// take a thousand times as long for it as for the first.
constexpr int64_t kBudgets[] = {100, 100, 100, 100, 1000, 1000, 1000, 80000};

// Reads numbers off the bytes; zeros when there are no more.
class Reader {
 public:
  Reader(const uint8_t* bytes, size_t size) : bytes_(bytes), size_(size) {}

  uint8_t Byte() { return size_ == 0 ? 0 : (--size_, *bytes_++); }

  // In [0, count).
  int64_t Below(int64_t count) {
    int64_t value = 0;
    for (int64_t most = 1; most < count; most *= 256) value = value * 256 + Byte();
    return value % count;
  }

  // What is left, over and over.
  void Fill(char* to, size_t count) const {
    for (size_t i = 0; i < count; ++i) to[i] = size_ == 0 ? 0 : static_cast<char>(bytes_[i % size_]);
  }

 private:
  const uint8_t* bytes_;
  size_t size_;
};

Case ReadCase(Reader* reader) {
  Case c;
  c.shape.layout = kLayouts[reader->Below(2)];
  c.type = kTypes[reader->Below(std::size(kTypes))];
  c.activation = kActivations[reader->Below(std::size(kActivations))];
  c.alpha = reader->Below(2) == 0 ? AlphaOf(c.activation) : 0;
  c.bias = reader->Below(2) == 1;
  c.shortcut = reader->Below(2) == 1;
  // Channels below kMaxColumns and above it; more samples than agc.cc has groups of them (kMaxGroups).
  const int64_t budget = kBudgets[reader->Below(8)];
  c.shape.channels = reader->Below(std::min<int64_t>(budget, 4200));
  const int64_t maps = budget / std::max<int64_t>(c.shape.channels, 1);
  c.shape.batch = reader->Below(std::min<int64_t>(maps, 130) + 1);
  c.shape.positions = 1 + reader->Below(std::max<int64_t>(maps / std::max<int64_t>(c.shape.batch, 1), 1));
  return c;
}

// A copy that begins `offset` elements off the allocator's alignment, and ends where the allocation does, which is what
// AddressSanitizer watches.
class Exact {
 public:
  Exact(Array* array, size_t element_bytes, size_t offset)
      : size_(array->size() * element_bytes), begin_(offset * element_bytes), bytes_(new char[begin_ + size_]) {
    std::memcpy(data(), array->data(), size_);
  }
  char* data() { return bytes_.get() + begin_; }
  void CopyFrom(const char* from) { std::memcpy(data(), from, size_); }
  void CopyTo(Array* array) { std::memcpy(array->data(), data(), size_); }

 private:
  size_t size_, begin_;
  std::unique_ptr<char[]> bytes_;
};

// As if there were several threads, from the last task to the first, on this one: AddressSanitizer takes milliseconds
// to start another.
Parallel Reversed(int threads) {
  auto run = [](void*, const Phase* phases, int count) {
    for (const Phase* phase = phases; phase < phases + count; ++phase) {
      for (int64_t i = phase->tasks - 1; i >= 0; --i) phase->task(phase->context, i);
    }
  };
  return {threads, nullptr, run};
}

// To the bit, but for which NaN it is.
void ExpectEqual(const Case& c, const char* name, Array* got, Array* want) {
  if (std::memcmp(got->data(), want->data(), got->size() * Bytes(c.type)) == 0) return;
  for (size_t i = 0; i < got->size(); ++i) {
    const double a = got->Get(i), b = want->Get(i);
    ASSERT_TRUE((std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)))
        << name << "[" << i << "]: " << a << " and " << b << ", " << c.Name();
  }
}

}  // namespace

void RunFuzzInput(const uint8_t* bytes, size_t size) {
  Reader reader(bytes, size);
  const Case c = ReadCase(&reader);
  const std::vector<InstructionSet> levels = Levels();
  const InstructionSet level = levels[static_cast<size_t>(reader.Below(static_cast<int64_t>(levels.size())))];
  const int threads = 1 + static_cast<int>(reader.Below(100));
  const Parallel parallel = reader.Below(32) == 0 ? Backwards(threads) : Reversed(threads);
  const size_t offset = static_cast<size_t>(reader.Below(8));
  const bool in_place = reader.Below(2) == 1;
  const int over = static_cast<int>(reader.Below(3));
  const bool any_bits = reader.Below(2) == 1;

  // One way: fresh outputs, one thread.
  Tensors t(c);
  if (any_bits) {
    for (Array* a : {&t.x, &t.dy, &t.shortcut}) reader.Fill(a->data(), a->size() * Bytes(c.type));
    for (Array* a : {&t.gain, &t.mean_scale, &t.dmean, &t.bias}) {
      reader.Fill(a->data(), a->size() * Bytes(ParameterType(c.type)));
    }
  }
  Forward(t.PrepareForward(c, false), Serial(), level);
  Backward(t.PrepareBackward(c, 0), Serial(), level);
  for (const Array* a : {&t.y, &t.mean, &t.dx, &t.dgain, &t.dmean_scale, &t.dbias, &t.dshortcut}) {
    ASSERT_TRUE(a->BordersIntact()) << c.Name();
  }
  if (!any_bits) {
    CheckForward(c, t);
    CheckBackward(c, t);
    if (testing::Test::HasFatalFailure()) return;
  }

  // The other: memory of exactly the right size, threads, in place.
  const size_t e = Bytes(c.type), u = Bytes(ParameterType(c.type));
  Exact x(&t.x, e, offset), gain(&t.gain, u, offset), mean_scale(&t.mean_scale, u, offset), y(&t.x, e, offset + 1);
  Exact mean(&t.mean, u, offset), bias(&t.bias, u, offset), shortcut(&t.shortcut, e, offset + 1);
  ForwardArgs forward = t.PrepareForward(c, false);
  forward.x = in_place ? y.data() : x.data();
  forward.gain = gain.data();
  forward.mean_scale = mean_scale.data();
  forward.y = y.data();
  forward.mean = mean.data();
  if (c.bias) forward.bias = bias.data();
  if (c.shortcut) forward.shortcut = shortcut.data();
  Forward(forward, parallel, level);

  Exact dy(&t.dy, e, offset), dmean(&t.dmean, u, offset), dx(&t.dy, e, offset + 2);
  Exact dgain(&t.dgain, u, offset), dmean_scale(&t.dmean_scale, u, offset), dbias(&t.dbias, u, offset);
  Exact dshortcut(&t.dy, e, offset + 1);
  Exact& kept = c.activation == Activation::kLinear ? x : y;
  if (over == 2) dx.CopyFrom(kept.data());
  BackwardArgs backward = t.PrepareBackward(c, 0);
  const bool has_shortcut = c.BackwardShortcut();
  Exact& over_dy = has_shortcut ? dshortcut : dx;
  backward.dy = over == 1 ? over_dy.data() : dy.data();
  backward.dmean = dmean.data();
  backward.kept = over == 2 ? dx.data() : kept.data();
  backward.mean = mean.data();
  backward.gain = gain.data();
  backward.mean_scale = mean_scale.data();
  backward.dx = dx.data();
  backward.dgain = dgain.data();
  backward.dmean_scale = dmean_scale.data();
  if (c.bias) backward.bias = bias.data();
  if (c.bias) backward.dbias = dbias.data();
  if (has_shortcut) backward.shortcut = shortcut.data();
  if (has_shortcut) backward.dshortcut = dshortcut.data();
  Backward(backward, parallel, level);

  Tensors other(c);
  y.CopyTo(&other.y);
  mean.CopyTo(&other.mean);
  dx.CopyTo(&other.dx);
  dgain.CopyTo(&other.dgain);
  dmean_scale.CopyTo(&other.dmean_scale);
  ExpectEqual(c, "y", &other.y, &t.y);
  ExpectEqual(c, "mean", &other.mean, &t.mean);
  ExpectEqual(c, "dx", &other.dx, &t.dx);
  ExpectEqual(c, "dgain", &other.dgain, &t.dgain);
  ExpectEqual(c, "dmean_scale", &other.dmean_scale, &t.dmean_scale);
  if (c.bias) {
    dbias.CopyTo(&other.dbias);
    ExpectEqual(c, "dbias", &other.dbias, &t.dbias);
  }
  if (has_shortcut) {
    dshortcut.CopyTo(&other.dshortcut);
    ExpectEqual(c, "dshortcut", &other.dshortcut, &t.dshortcut);
  }
}

}  // namespace core
}  // namespace tf_agc
