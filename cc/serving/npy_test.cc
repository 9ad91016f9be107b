// Reading and writing .npy files: headers as NumPy writes them and as it does not, files cut anywhere. That NumPy
// itself reads what is written here is tested from Python.

#include "cc/serving/npy.h"

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace tf_agc {
namespace serving {
namespace {

constexpr char kFloatHeader[] = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";

// A file of its own for each test; removed with it.
class NpyTest : public testing::Test {
 protected:
  NpyTest() : path_(testing::TempDir() + "npy_test_" + TestName() + ".npy") { std::remove(path_.c_str()); }
  ~NpyTest() override { std::remove(path_.c_str()); }

  void Write(const std::string& content) { std::ofstream(path_, std::ios::binary) << content; }

  std::string Content() {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  // What ReadNpy has to say of a file with this content, without the path.
  std::string ErrorOf(const std::string& content) {
    Write(content);
    Array array;
    const std::string error = ReadNpy(path_, &array);
    if (error.empty()) return "";
    EXPECT_EQ(error.substr(0, path_.size()), path_);
    EXPECT_TRUE(array.bytes.empty());
    return error.substr(path_.size() + 1);
  }

  const std::string path_;

 private:
  static std::string TestName() { return testing::UnitTest::GetInstance()->current_test_info()->name(); }
};

std::string File(const std::string& header, size_t data_size, char version = 1) {
  std::string file = std::string("\x93NUMPY") + version + '\0';
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) file += static_cast<char>((header.size() + 1) >> (8 * i));
  return file + header + '\n' + std::string(data_size, '\0');
}

std::string Header(const std::string& descr, const std::string& shape) {
  return "{'descr': " + descr + ", 'fortran_order': False, 'shape': " + shape + ", }";
}

TEST_F(NpyTest, RoundTrip) {
  const std::vector<std::vector<int64_t>> shapes = {{}, {3}, {2, 3}, {1, 0, 5}, std::vector<int64_t>(64, 1)};
  for (ElementType type : {ElementType::kBool, ElementType::kUint8, ElementType::kInt32, ElementType::kInt64,
                           ElementType::kFloat16, ElementType::kFloat32, ElementType::kFloat64}) {
    for (const std::vector<int64_t>& shape : shapes) {
      Array array{type, shape, ""};
      size_t bytes = Size(type);
      for (int64_t size : shape) bytes *= static_cast<size_t>(size);
      for (size_t i = 0; i < bytes; ++i) array.bytes += static_cast<char>(type == ElementType::kBool ? i % 2 : 37 * i);

      std::remove(path_.c_str());
      ASSERT_EQ(WriteNpy(path_, array), "");
      EXPECT_EQ((Content().size() - bytes) % 64, 0u);  // where NumPy wants the data
      Array read;
      ASSERT_EQ(ReadNpy(path_, &read), "");
      EXPECT_EQ(read.type, type) << Name(type);
      EXPECT_EQ(read.shape, shape);
      EXPECT_EQ(read.bytes, array.bytes);
    }
  }
}

TEST_F(NpyTest, HeadersThatOtherWritersMake) {
  for (char version : {1, 2, 3}) EXPECT_EQ(ErrorOf(File(kFloatHeader, 24, version)), "");
  EXPECT_EQ(ErrorOf(File("{\"shape\":(2,3),\"fortran_order\":False,\"descr\":\"<f4\"}", 24)), "");
  EXPECT_EQ(ErrorOf(File("{ 'shape': (2, 3,), 'descr': '<f4', 'fortran_order': False }    ", 24)), "");
}

TEST_F(NpyTest, MalformedHeaders) {
  const std::string says = "has a header that is not that of a .npy file: ";
  for (const std::string& header : std::vector<std::string>{
           "",
           "{}",
           "{",
           "}",
           "{'descr': '<f4', 'fortran_order': False}",
           "{'descr': '<f4', 'shape': (2, 3)}",
           "{'fortran_order': False, 'shape': (2, 3)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}",
           "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
           "{'descr': '<f4' 'fortran_order': False, 'shape': (2, 3)}",
           "{'descr': '<f4, 'fortran_order': False, 'shape': (2, 3)}",
           "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}",
           "{'descr': [('a', '<f4'), 'fortran_order': False, 'shape': (2, 3)}",
           Header("'<f4'", "(2, 3"),
           Header("'<f4'", "(2 3)"),
           Header("'<f4'", "(6)"),
           Header("'<f4'", "6"),
           Header("'<f4'", "(-2, -3)"),
           Header("'<f4'", "(2.0, 3)"),
           Header("'<f4'", "(,)"),
           Header("'<f4'", "(2,,3)"),
           Header("'<f4'", "(99999999999999999999,)"),
           std::string(kFloatHeader) + "x",
       }) {
    EXPECT_EQ(ErrorOf(File(header, 24)), says + header);
  }
  std::string axes;
  for (int i = 0; i < 65; ++i) axes += "1,";
  EXPECT_EQ(ErrorOf(File(Header("'<f4'", "(" + axes + ")"), 4)).compare(0, says.size(), says), 0);
}

TEST_F(NpyTest, OtherTypesAndOrders) {
  const std::string expected = ", expected bool, uint8, or little-endian int32, int64, float16, float32 or float64";
  EXPECT_EQ(ErrorOf(File(Header("'>f4'", "(2, 3)"), 24)), "has dtype >f4 (big-endian)" + expected);
  EXPECT_EQ(ErrorOf(File(Header("'<c8'", "(2, 3)"), 48)), "has dtype <c8" + expected);
  EXPECT_EQ(ErrorOf(File(Header("'|O'", "(2, 3)"), 24)), "has dtype |O" + expected);
  EXPECT_EQ(ErrorOf(File(Header("''", "(2, 3)"), 24)), "has dtype " + expected);
  EXPECT_EQ(ErrorOf(File(Header("[('a', '<f4')]", "(2, 3)"), 24)), "has dtype [('a', '<f4')]" + expected);
  EXPECT_EQ(ErrorOf(File("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", 24)),
            "is in Fortran order, expected C order (numpy.ascontiguousarray)");
  EXPECT_EQ(ErrorOf(File(Header("'|b1'", "(1,)"), 0) + '\2'), "has a bool that is neither 0 nor 1");
}

TEST_F(NpyTest, HugeShapes) {
  const std::string says = ", which is more than any memory holds";
  EXPECT_EQ(ErrorOf(File(Header("'<f4'", "(4611686018427387904,)"), 0)), "has shape [4611686018427387904]" + says);
  EXPECT_EQ(ErrorOf(File(Header("'|u1'", "(4294967296, 4294967296)"), 0)), "has shape [4294967296,4294967296]" + says);
  EXPECT_EQ(ErrorOf(File(Header("'|u1'", "(0, 4294967296, 4294967296)"), 0)),
            "has shape [0,4294967296,4294967296]" + says);
  EXPECT_EQ(ErrorOf(File(Header("'<f8'", "(1000000000000,)"), 8)),
            "is truncated: shape [1000000000000] of float64 takes 8000000000000 bytes, got 8");
}

TEST_F(NpyTest, CutAnywhere) {
  const std::string whole = File(kFloatHeader, 24);
  ASSERT_EQ(ErrorOf(whole), "");
  for (size_t size = 0; size < whole.size(); ++size) EXPECT_NE(ErrorOf(whole.substr(0, size)), "") << size;
  EXPECT_EQ(ErrorOf(whole.substr(0, 5)), "is not a .npy file: it does not begin with \\x93NUMPY");
  EXPECT_EQ(ErrorOf(whole.substr(0, 6)), "is truncated: it ends within the header, after 6 bytes");
  EXPECT_EQ(ErrorOf(whole.substr(0, 40)), "is truncated: it ends within the header, after 40 bytes");
  EXPECT_EQ(ErrorOf(whole.substr(0, whole.size() - 1)), "is truncated: shape [2,3] of float32 takes 24 bytes, got 23");
  EXPECT_EQ(ErrorOf(whole + "x"), "is too long: shape [2,3] of float32 takes 24 bytes, got 25");
}

TEST_F(NpyTest, OtherFiles) {
  EXPECT_EQ(ErrorOf("PK\3\4 an .npz file"), "is not a .npy file: it does not begin with \\x93NUMPY");
  EXPECT_EQ(ErrorOf(File(kFloatHeader, 24, 4)), "has .npy format version 4, expected 1, 2 or 3");
  EXPECT_EQ(ErrorOf(File(kFloatHeader, 24, 0)), "has .npy format version 0, expected 1, 2 or 3");
  Array array;
  EXPECT_EQ(ReadNpy(path_ + ".none", &array), path_ + ".none cannot be read: No such file or directory");
  EXPECT_EQ(ReadNpy(testing::TempDir(), &array), testing::TempDir() + " is a directory, not a .npy file");
}

TEST_F(NpyTest, NothingIsReplacedOrLeftBehind) {
  const Array array{ElementType::kFloat32, {2}, std::string(8, 'x')};
  Write("somebody's");
  EXPECT_EQ(WriteNpy(path_, array), path_ + " cannot be written: File exists");
  EXPECT_EQ(Content(), "somebody's");
  EXPECT_EQ(WriteNpy(path_ + "/y.npy", array), path_ + "/y.npy cannot be written: Not a directory");
}

}  // namespace
}  // namespace serving
}  // namespace tf_agc
