// NumPy's .npy files, format versions 1 to 3, for saved_model_runner: arrays in C order, little-endian, of the types
// below. No TensorFlow here. Files are not trusted: whatever they hold, the answer is an array or a sentence.

#ifndef TF_AGC_CC_SERVING_NPY_H_
#define TF_AGC_CC_SERVING_NPY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tf_agc {
namespace serving {

enum class ElementType { kBool, kUint8, kInt32, kInt64, kFloat16, kFloat32, kFloat64 };

// NumPy's name, "float32".
const char* Name(ElementType type);

// Bytes of one element.
size_t Size(ElementType type);

struct Array {
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;
  std::string bytes;  // elements in C order: the product of `shape` times Size(type) bytes
};

// Both return an empty string or what is wrong, as a sentence that begins with the path.
//
// WriteNpy never replaces a file and leaves none behind that is not whole.
std::string ReadNpy(const std::string& path, Array* array);
std::string WriteNpy(const std::string& path, const Array& array);

}  // namespace serving
}  // namespace tf_agc

#endif  // TF_AGC_CC_SERVING_NPY_H_
