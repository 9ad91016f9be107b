// Runs a signature of a SavedModel on .npy files and times it: loaded by TensorFlow's own loader, with the ops linked
// in, as in the model server. For checking and timing a model without one; what serves requests is the model server.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/base/log_severity.h"
#include "absl/log/globals.h"
#include "cc/serving/npy.h"
#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/public/session.h"
#include "tensorflow/core/public/session_options.h"
#include "tensorflow/core/util/command_line_flags.h"

namespace tf_agc {
namespace serving {
namespace {

using tensorflow::DataType;
using tensorflow::Tensor;

// tensorflow::kSavedModelTagServe: the pip package lacks its header.
constexpr char kServeTag[] = "serve";
// The loader's own signatures, which initialise the model, begin so.
constexpr char kInternalSignature[] = "__saved_model_";

constexpr std::pair<ElementType, DataType> kTypes[] = {
    {ElementType::kBool, tensorflow::DT_BOOL},     {ElementType::kUint8, tensorflow::DT_UINT8},
    {ElementType::kInt32, tensorflow::DT_INT32},   {ElementType::kInt64, tensorflow::DT_INT64},
    {ElementType::kFloat16, tensorflow::DT_HALF},  {ElementType::kFloat32, tensorflow::DT_FLOAT},
    {ElementType::kFloat64, tensorflow::DT_DOUBLE}};

// One line on stderr, and the process ends. Also where TensorFlow's message has several lines.
[[noreturn]] void Fail(std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::fprintf(stderr, "saved_model_runner: %s\n", message.c_str());
  std::exit(1);
}

struct Options {
  std::string model;
  std::string signature = "serving_default";
  std::vector<std::string> inputs;  // NAME=FILE
  std::string output_dir;
  int64_t runs = 100;
  int64_t warmup = 10;
};

int64_t Count(const char* flag, const std::string& text, int64_t minimum) {
  constexpr int64_t kMaximum = 1000000;
  const bool digits = !text.empty() && text.size() < 10 && text.find_first_not_of("0123456789") == std::string::npos;
  const int64_t count = digits ? std::stoll(text) : -1;
  if (count < minimum || count > kMaximum) {
    Fail(std::string(flag) + " must be a whole number from " + std::to_string(minimum) + " to " +
         std::to_string(kMaximum) + ", got \"" + text + "\"");
  }
  return count;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  std::string runs = std::to_string(options.runs), warmup = std::to_string(options.warmup);
  const auto add_input = [&options](const std::string& input) {
    options.inputs.push_back(input);
    return true;
  };
  const std::vector<tensorflow::Flag> flags = {
      tensorflow::Flag("model", &options.model, "directory of one version of a SavedModel, with saved_model.pb in it"),
      tensorflow::Flag("signature", &options.signature, "signature to run"),
      tensorflow::Flag("input", add_input, "", "NAME=FILE.npy; once for every input of the signature"),
      tensorflow::Flag("output_dir", &options.output_dir,
                       "where the outputs are written, as NAME.npy; default: nowhere"),
      tensorflow::Flag("runs", &runs, "how many runs are timed"),
      tensorflow::Flag("warmup", &warmup, "how many runs come before them, untimed"),
  };
  const std::string usage = tensorflow::Flags::Usage(argv[0], flags);
  const bool parsed = tensorflow::Flags::Parse(&argc, argv, flags);
  if (argc > 1 && std::strcmp(argv[1], "--help") == 0) {
    std::printf("%s", usage.c_str());
    std::exit(0);
  }
  if (argc > 1) Fail(std::string("unknown argument ") + argv[1] + " (flags are written --name=value; see --help)");
  if (!parsed) Fail("an argument has a malformed value (see --help)");
  options.runs = Count("--runs", runs, 1);
  options.warmup = Count("--warmup", warmup, 0);
  if (options.model.empty()) Fail("--model is missing: the directory of a SavedModel (see --help)");
  return options;
}

std::string Quoted(const std::string& name) { return "\"" + name + "\""; }

// NumPy's name for the types that a .npy file can hold here, TensorFlow's for others.
std::string TypeName(DataType type) {
  for (const auto& [element, data_type] : kTypes) {
    if (data_type == type) return Name(element);
  }
  return tensorflow::DataTypeString(type);
}

template <typename Map>
std::string Names(const Map& map) {
  std::vector<std::string> names;
  for (const auto& [name, unused] : map) {
    if (name.compare(0, std::strlen(kInternalSignature), kInternalSignature) != 0) names.push_back(Quoted(name));
  }
  if (names.empty()) return "none";
  std::sort(names.begin(), names.end());
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

void Load(const std::string& directory, tensorflow::SavedModelBundleLite* bundle) {
  if (!tensorflow::MaybeSavedModelDirectory(directory)) {
    Fail("--model must be the directory of one version of a SavedModel, with saved_model.pb in it, got " + directory);
  }
  const absl::Status status = tensorflow::LoadSavedModel(tensorflow::SessionOptions(), tensorflow::RunOptions(),
                                                         directory, {kServeTag}, bundle);
  if (!status.ok()) Fail("cannot load " + directory + ": " + std::string(status.message()));
}

const tensorflow::SignatureDef& FindSignature(const tensorflow::SavedModelBundleLite& bundle, const std::string& name) {
  const auto found = bundle.GetSignatures().find(name);
  if (found == bundle.GetSignatures().end() ||
      name.compare(0, std::strlen(kInternalSignature), kInternalSignature) == 0) {
    Fail("--signature must be one that the model has (" + Names(bundle.GetSignatures()) + "), got " + Quoted(name));
  }
  return found->second;
}

// The session's name of a signature's input or output.
const std::string& TensorName(const std::string& name, const tensorflow::TensorInfo& info) {
  if (info.encoding_case() != tensorflow::TensorInfo::kName) {
    Fail(Quoted(name) + " of the signature is sparse, ragged or composite: only dense tensors are supported");
  }
  return info.name();
}

Tensor ReadInput(const std::string& name, const std::string& file, const tensorflow::TensorInfo& info) {
  Array array;
  const std::string error = ReadNpy(file, &array);
  if (!error.empty()) Fail("--input " + Quoted(name) + ": " + error);

  const DataType type = std::find_if(std::begin(kTypes), std::end(kTypes), [&array](const auto& pair) {
                          return pair.first == array.type;
                        })->second;
  if (type != info.dtype()) {
    Fail("--input " + Quoted(name) + " must have dtype " + TypeName(info.dtype()) + ", got " + Name(array.type) +
         " in " + file);
  }
  tensorflow::TensorShape shape;
  const absl::Status status = tensorflow::TensorShape::BuildTensorShape(array.shape, &shape);
  if (!status.ok()) Fail("--input " + Quoted(name) + ": " + file + ": " + std::string(status.message()));
  tensorflow::PartialTensorShape expected;
  const absl::Status valid = tensorflow::PartialTensorShape::BuildPartialTensorShape(info.tensor_shape(), &expected);
  if (!valid.ok()) Fail(Quoted(name) + " of the signature has no valid shape: " + std::string(valid.message()));
  if (!expected.IsCompatibleWith(shape)) {
    Fail("--input " + Quoted(name) + " must have shape " + expected.DebugString() + ", got " + shape.DebugString() +
         " in " + file);
  }
  Tensor tensor(type, shape);
  // Of an empty tensor either pointer may be null.
  if (!array.bytes.empty()) std::memcpy(tensor.data(), array.bytes.data(), array.bytes.size());
  return tensor;
}

// The signature's inputs as the session wants them, in the order of the names.
std::vector<std::pair<std::string, Tensor>> ReadInputs(const Options& options,
                                                       const tensorflow::SignatureDef& signature) {
  std::map<std::string, std::string> files;
  for (const std::string& input : options.inputs) {
    const size_t equals = input.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == input.size()) {
      Fail("--input must be NAME=FILE.npy, got " + Quoted(input));
    }
    const std::string name = input.substr(0, equals);
    if (!signature.inputs().contains(name)) {
      Fail("--input must name an input of signature " + Quoted(options.signature) + " (" + Names(signature.inputs()) +
           "), got " + Quoted(name));
    }
    if (!files.emplace(name, input.substr(equals + 1)).second) Fail("--input " + Quoted(name) + " is given twice");
  }
  std::vector<std::pair<std::string, Tensor>> feeds;
  const std::map<std::string, tensorflow::TensorInfo> inputs(signature.inputs().begin(), signature.inputs().end());
  for (const auto& [name, info] : inputs) {
    const auto file = files.find(name);
    if (file == files.end()) {
      Fail("--input is missing for " + Quoted(name) + " of signature " + Quoted(options.signature) + " (" +
           Names(inputs) + ")");
    }
    feeds.emplace_back(TensorName(name, info), ReadInput(name, file->second, info));
    std::printf("input %s: %s %s\n", name.c_str(), TypeName(info.dtype()).c_str(),
                feeds.back().second.shape().DebugString().c_str());
  }
  return feeds;
}

struct Output {
  std::string name;    // in the signature
  std::string tensor;  // in the session
  std::string file;    // empty: not written
};

// Finds what cannot be written before anything runs.
std::vector<Output> PlanOutputs(const Options& options, const tensorflow::SignatureDef& signature) {
  std::vector<Output> outputs;
  const std::map<std::string, tensorflow::TensorInfo> infos(signature.outputs().begin(), signature.outputs().end());
  for (const auto& [name, info] : infos) {
    Output output{name, TensorName(name, info), ""};
    if (!options.output_dir.empty()) {
      if (std::none_of(std::begin(kTypes), std::end(kTypes),
                       [&info](const auto& pair) { return pair.second == info.dtype(); })) {
        Fail("output " + Quoted(name) + " has dtype " + TypeName(info.dtype()) +
             ", which is not written to .npy files: run without --output_dir");
      }
      if (name.find('/') != std::string::npos) {
        Fail("output " + Quoted(name) + " has a name that is no file name: run without --output_dir");
      }
      output.file = options.output_dir + "/" + name + ".npy";
      std::error_code error;
      if (std::filesystem::exists(output.file, error)) {
        Fail("--output_dir must have no file of an output yet, got " + output.file);
      }
    }
    outputs.push_back(std::move(output));
  }
  if (!options.output_dir.empty()) {
    std::error_code error;
    std::filesystem::create_directories(options.output_dir, error);
    if (error) Fail("--output_dir " + options.output_dir + " cannot be made: " + error.message());
  }
  return outputs;
}

void WriteOutputs(const std::vector<Output>& outputs, const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Tensor& tensor = tensors[i];
    std::printf("output %s: %s %s\n", outputs[i].name.c_str(), TypeName(tensor.dtype()).c_str(),
                tensor.shape().DebugString().c_str());
    if (outputs[i].file.empty()) continue;
    Array array;
    for (const auto& [element, data_type] : kTypes) {
      if (data_type == tensor.dtype()) array.type = element;
    }
    for (int64_t size : tensor.shape().dim_sizes()) array.shape.push_back(size);
    array.bytes = std::string(tensor.tensor_data());
    const std::string error = WriteNpy(outputs[i].file, array);
    if (!error.empty()) Fail("--output_dir: " + error);
  }
}

// The smallest time that `percent` of all runs do not exceed.
double Percentile(const std::vector<double>& sorted, size_t percent) {
  return sorted[(sorted.size() * percent + 99) / 100 - 1];
}

void Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  tensorflow::SavedModelBundleLite bundle;
  Load(options.model, &bundle);
  const tensorflow::SignatureDef& signature = FindSignature(bundle, options.signature);
  const std::vector<std::pair<std::string, Tensor>> feeds = ReadInputs(options, signature);
  const std::vector<Output> outputs = PlanOutputs(options, signature);
  std::vector<std::string> fetches;
  for (const Output& output : outputs) fetches.push_back(output.tensor);

  std::vector<Tensor> results;
  std::vector<double> milliseconds;
  for (int64_t i = 0; i < options.warmup + options.runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const absl::Status status = bundle.GetSession()->Run(feeds, fetches, {}, &results);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    if (!status.ok()) Fail("signature " + Quoted(options.signature) + " failed: " + std::string(status.message()));
    if (i >= options.warmup) milliseconds.push_back(taken.count());
  }

  WriteOutputs(outputs, results);
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("latency in ms: p50 %.3f, p90 %.3f, p99 %.3f, max %.3f (%lld runs after %lld to warm up)\n",
              Percentile(milliseconds, 50), Percentile(milliseconds, 90), Percentile(milliseconds, 99),
              milliseconds.back(), static_cast<long long>(options.runs), static_cast<long long>(options.warmup));
}

}  // namespace
}  // namespace serving
}  // namespace tf_agc

int main(int argc, char** argv) {
  // What TensorFlow logs as an error also comes back as a status, and the rest is news of this machine. TensorFlow 2.20
  // has a second log, whose level TF_CPP_MIN_LOG_LEVEL has set before this.
  absl::SetMinLogLevel(absl::LogSeverityAtLeast::kFatal);
  tf_agc::serving::Main(argc, argv);
  return 0;
}
