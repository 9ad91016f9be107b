// The header of a .npy file is a dictionary in Python's notation: see numpy.lib.format.

#include "cc/serving/npy.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <utility>

namespace tf_agc {
namespace serving {
namespace {

struct Description {
  ElementType type;
  const char* name;
  const char* descr;
  size_t size;
};

constexpr Description kDescriptions[] = {
    {ElementType::kBool, "bool", "|b1", 1},       {ElementType::kUint8, "uint8", "|u1", 1},
    {ElementType::kInt32, "int32", "<i4", 4},     {ElementType::kInt64, "int64", "<i8", 8},
    {ElementType::kFloat16, "float16", "<f2", 2}, {ElementType::kFloat32, "float32", "<f4", 4},
    {ElementType::kFloat64, "float64", "<f8", 8},
};

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicSize = 6;
constexpr size_t kMaxRank = 64;  // NumPy's own limit
// NumPy's readers want the data to begin at a multiple of this.
constexpr size_t kAlignment = 64;

const Description& Describe(ElementType type) {
  for (const Description& description : kDescriptions) {
    if (description.type == type) return description;
  }
  return kDescriptions[0];  // not reached: the table has every type
}

// Reads the header's dictionary. A method returns false where the text is not what it looks for.
class HeaderParser {
 public:
  explicit HeaderParser(const std::string& text) : text_(text) {}

  bool Parse(std::string* descr, bool* fortran_order, std::vector<int64_t>* shape) {
    bool has_descr = false, has_order = false, has_shape = false;
    if (!Take('{')) return false;
    while (!Take('}')) {
      std::string key;
      if (!String(&key) || !Take(':')) return false;
      if (key == "descr" && !has_descr) {
        has_descr = DescrValue(descr);
        if (!has_descr) return false;
      } else if (key == "fortran_order" && !has_order) {
        has_order = Bool(fortran_order);
        if (!has_order) return false;
      } else if (key == "shape" && !has_shape) {
        has_shape = Shape(shape);
        if (!has_shape) return false;
      } else {
        return false;
      }
      if (!Take(',') && !Peek('}')) return false;
    }
    SkipSpace();
    return at_ == text_.size() && has_descr && has_order && has_shape;
  }

 private:
  void SkipSpace() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  bool Peek(char c) {
    SkipSpace();
    return at_ < text_.size() && text_[at_] == c;
  }

  bool Take(char c) {
    if (!Peek(c)) return false;
    ++at_;
    return true;
  }

  bool String(std::string* value) {
    SkipSpace();
    if (at_ == text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) return false;
    const size_t end = text_.find(text_[at_], at_ + 1);
    if (end == std::string::npos) return false;
    *value = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return true;
  }

  // A list instead of a string is a structured type: its text stands for it in the error.
  bool DescrValue(std::string* value) {
    if (!Peek('[')) return String(value);
    const size_t end = text_.find(']', at_);
    if (end == std::string::npos) return false;
    *value = text_.substr(at_, end + 1 - at_);
    at_ = end + 1;
    return true;
  }

  bool Word(const char* word) {
    SkipSpace();
    if (text_.compare(at_, std::strlen(word), word) != 0) return false;
    at_ += std::strlen(word);
    return true;
  }

  bool Bool(bool* value) {
    *value = Word("True");
    return *value || Word("False");
  }

  bool Shape(std::vector<int64_t>* shape) {
    if (!Take('(')) return false;
    while (!Take(')')) {
      SkipSpace();
      const size_t digits = at_;
      int64_t size = 0;
      for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
        if (__builtin_mul_overflow(size, 10, &size) || __builtin_add_overflow(size, text_[at_] - '0', &size))
          return false;
      }
      if (at_ == digits || shape->size() == kMaxRank) return false;
      shape->push_back(size);
      // (3) is a number in Python, and only (3,) a tuple; NumPy writes the latter.
      if (!Take(',') && (!Peek(')') || shape->size() == 1)) return false;
    }
    return true;
  }

  const std::string& text_;
  size_t at_ = 0;
};

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? "," : "") << shape[i];
  text << "]";
  return text.str();
}

// The number of bytes of an array. False where that does not fit 63 bits, also where it does only thanks to a size of
// 0: TensorFlow takes no such shape.
bool ByteCount(const std::vector<int64_t>& shape, size_t element_size, int64_t* count) {
  *count = static_cast<int64_t>(element_size);
  bool empty = false;
  for (int64_t size : shape) {
    if (size == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(*count, size, count)) {
      return false;
    }
  }
  if (empty) *count = 0;
  return true;
}

std::string ReadFile(const std::string& path, std::string* content) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return path + " is a directory, not a .npy file";
  std::ifstream file(path, std::ios::binary);
  if (!file) return path + " cannot be read: " + std::strerror(errno);
  content->assign(std::istreambuf_iterator<char>(file), {});
  if (file.bad()) return path + " cannot be read to its end";
  return "";
}

}  // namespace

const char* Name(ElementType type) { return Describe(type).name; }

size_t Size(ElementType type) { return Describe(type).size; }

std::string ReadNpy(const std::string& path, Array* array) {
  std::string content;
  std::string error = ReadFile(path, &content);
  if (!error.empty()) return error;

  if (content.compare(0, kMagicSize, kMagic) != 0) {
    return path + " is not a .npy file: it does not begin with \\x93NUMPY";
  }
  const auto byte = [&content](size_t i) -> size_t { return static_cast<unsigned char>(content[i]); };
  const size_t version = content.size() > kMagicSize ? byte(kMagicSize) : 0;
  if (content.size() > kMagicSize && (version < 1 || version > 3)) {
    return path + " has .npy format version " + std::to_string(version) + ", expected 1, 2 or 3";
  }
  const size_t length_bytes = version == 1 ? 2 : 4;
  const size_t header_begin = kMagicSize + 2 + length_bytes;
  size_t header_size = 0;
  for (size_t i = 0; i < length_bytes && content.size() >= header_begin; ++i) {
    header_size |= byte(kMagicSize + 2 + i) << (8 * i);
  }
  if (content.size() < header_begin || content.size() - header_begin < header_size) {
    return path + " is truncated: it ends within the header, after " + std::to_string(content.size()) + " bytes";
  }

  const std::string header = content.substr(header_begin, header_size);
  std::string descr;
  bool fortran_order = false;
  Array result;
  if (!HeaderParser(header).Parse(&descr, &fortran_order, &result.shape)) {
    return path + " has a header that is not that of a .npy file: " + header.substr(0, header.find('\n'));
  }
  const Description* found = nullptr;
  for (const Description& description : kDescriptions) {
    if (descr == description.descr) found = &description;
  }
  if (!found) {
    const bool big_endian = !descr.empty() && descr[0] == '>';
    return path + " has dtype " + descr + (big_endian ? " (big-endian)" : "") +
           ", expected bool, uint8, or little-endian int32, int64, float16, float32 or float64";
  }
  if (fortran_order) return path + " is in Fortran order, expected C order (numpy.ascontiguousarray)";
  result.type = found->type;

  int64_t expected;
  if (!ByteCount(result.shape, found->size, &expected)) {
    return path + " has shape " + ShapeText(result.shape) + ", which is more than any memory holds";
  }
  const size_t data_size = content.size() - header_begin - header_size;
  if (data_size != static_cast<size_t>(expected)) {
    return path + (data_size < static_cast<size_t>(expected) ? " is truncated" : " is too long") + ": shape " +
           ShapeText(result.shape) + " of " + found->name + " takes " + std::to_string(expected) + " bytes, got " +
           std::to_string(data_size);
  }
  result.bytes = std::move(content.erase(0, header_begin + header_size));
  if (found->type == ElementType::kBool) {
    for (char value : result.bytes) {
      if (value != 0 && value != 1) return path + " has a bool that is neither 0 nor 1";
    }
  }
  *array = std::move(result);
  return "";
}

std::string WriteNpy(const std::string& path, const Array& array) {
  std::string header =
      std::string("{'descr': '") + Describe(array.type).descr + "', 'fortran_order': False, 'shape': (";
  for (int64_t size : array.shape) header += std::to_string(size) + ",";
  header += "), }";
  header.append(kAlignment - (kMagicSize + 4 + header.size() + 1) % kAlignment, ' ');
  header += '\n';

  // The longest header, of 64 axes, fits the two bytes of version 1.
  std::string begin(kMagic, kMagicSize);
  begin += {'\x01', '\x00', static_cast<char>(header.size() & 255), static_cast<char>(header.size() >> 8)};
  FILE* file = std::fopen(path.c_str(), "wbx");  // x: fails where the file exists
  if (!file) return path + " cannot be written: " + std::strerror(errno);
  const auto write = [file](const std::string& bytes) {
    return std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
  };
  bool written = write(begin) && write(header) && write(array.bytes);
  int error = errno;
  if (std::fclose(file) != 0 && written) {
    written = false;
    error = errno;
  }
  if (written) return "";
  std::remove(path.c_str());
  return path + " cannot be written: " + std::strerror(error);
}

}  // namespace serving
}  // namespace tf_agc
