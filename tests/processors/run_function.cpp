// Calls a function of one of the package's C++ files: -include says which file, and FUNCTIONS which
// functions it has, as CALL(type of the result, name). Reads the function's name and arguments as
// test_training.py writes them, and writes its result and then all arrays as they are afterwards.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::abort();
}

template <class Number>
Number number() {
    Number found;
    read(&found, sizeof found);
    return found;
}

struct Array {
    void* numbers;
    size_t bytes;
};
std::vector<Array> arrays;

// Read an array, which its size in bytes precedes. A size of -1 means null; of -2, structures: 8
// bytes at a time, each a number or the address of an array.
void* array() {
    int64_t bytes = number<int64_t>();
    if (bytes == -1) return nullptr;
    if (bytes == -2) {
        int64_t count = number<int64_t>(), *words = new int64_t[count];
        for (int64_t i = 0; i < count; i++) {
            bool is_array = number<int64_t>();
            words[i] = is_array ? (int64_t)array() : number<int64_t>();
        }
        return words;
    }
    void* numbers = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
    read(numbers, bytes);
    arrays.push_back({numbers, (size_t)bytes});
    return numbers;
}

template <class Kind>
Kind argument() {
    if constexpr (std::is_pointer_v<Kind>) return (Kind)array();
    else if constexpr (std::is_floating_point_v<Kind>) return number<double>();
    else return number<int64_t>();
}

template <class Result, class... Kinds>
void call(Result (*function)(Kinds...)) {
    std::tuple<Kinds...> arguments{argument<Kinds>()...};  // braces: read in this order
    if constexpr (std::is_void_v<Result>) {
        std::apply(function, arguments);
    } else {
        Result found = std::apply(function, arguments);
        std::fwrite(&found, sizeof found, 1, stdout);
    }
    for (const Array& each : arrays) std::fwrite(each.numbers, 1, each.bytes, stdout);
}

int main() {
    std::string name(number<int64_t>(), ' ');
    read(name.data(), name.size());
#define CALL(Result, function) \
    if (name == #function) call<Result>(function);
    FUNCTIONS
}
