// Index operations and moves against loops over coordinates: all exact.
#include "harness.hpp"
#include "../common/walk.cuh"
#include <algorithm>
#include <numeric>
using namespace smalti;
using test::Dev;

namespace {

using Shape = std::vector<int64_t>;

int64_t product(const Shape& s) { return std::accumulate(s.begin(), s.end(), (int64_t)1, std::multiplies<int64_t>()); }

/// Memory on the device with a view of any strides; element by coordinates on the host.
template <class T> struct Strided {
  std::vector<T> host;
  Dev<T> dev;
  smalti_view view{};
  Strided(std::vector<T> values, const Shape& shape, const Shape& stride, int64_t offset = 0) : host(values), dev(host) {
    view.dtype = test::dtype_of<T>();
    view.rank = (int)shape.size();
    view.ptr = (void*)(dev.p + offset);
    start = offset;
    for (int d = 0; d < view.rank; d++) { view.shape[d] = shape[d]; view.stride[d] = stride[d]; }
  }
  T at(const Shape& c) const {
    int64_t i = start;
    for (size_t d = 0; d < c.size(); d++) i += c[d] * view.stride[d];
    return host[i];
  }
  int64_t start;
};

Shape dense(const Shape& s) {
  Shape t(s.size());
  int64_t step = 1;
  for (int d = (int)s.size() - 1; d >= 0; d--) { t[d] = step; step *= s[d]; }
  return t;
}
template <class F> void each(const Shape& shape, F f) {
  Shape c(shape.size(), 0);
  for (int64_t i = 0, n = product(shape); i < n; i++) {
    f(c);
    for (int d = (int)shape.size() - 1; d >= 0 && ++c[d] == shape[d]; d--) c[d] = 0;
  }
}
template <class T> std::vector<T> numbers(int64_t n) {
  std::vector<T> v(n);
  for (int64_t i = 0; i < n; i++) {
    if constexpr (std::is_integral_v<T>) v[i] = (T)(i * 7 + 1);
    else v[i] = narrow<T>((Acc<T>)(i % 251));
  }
  return v;
}
std::vector<int64_t> ids(int64_t n, int64_t below, unsigned seed) {
  std::mt19937 r(seed);
  std::vector<int64_t> v(n);
  for (auto& x : v) x = (int64_t)(r() % (uint32_t)below);
  return v;
}

/// x [a, n, b] in some layout, index [a, k, b] dense or spread over the last dimension.
template <class T> void gather_case(Shape shape, Shape stride, int dim, int64_t k, bool spread) {
  Strided<T> x(numbers<T>(4096), shape, stride);
  Shape to = shape;
  to[dim] = k;
  Shape index_stride = dense(to);
  int64_t memory = product(to);
  if (spread) {
    index_stride = Shape(shape.size(), 0);
    index_stride[dim] = 1;
    memory = k;
  }
  Strided<int64_t> index(ids(memory, shape[dim], 5), to, index_stride);
  Dev<T> y(product(to));
  const auto vy = test::view(y, to);
  std::vector<T> want;
  each(to, [&](Shape c) {
    const int64_t id = index.at(c);
    c[dim] = id;
    want.push_back(x.at(c));
  });
  CHECK_RC(smalti_gather(&x.view, dim, &index.view, &vy, nullptr));
  test::check_same("gather", y.get(), want);
}

/// Stable argsort along `dim` of an index of rank 2 (dense).
std::vector<int64_t> argsort(const std::vector<int64_t>& v, int64_t rows, int64_t columns, int dim) {
  std::vector<int64_t> out(v.size());
  const int64_t lines = dim ? rows : columns, n = dim ? columns : rows;
  for (int64_t l = 0; l < lines; l++) {
    std::vector<int64_t> o(n);
    std::iota(o.begin(), o.end(), 0);
    const auto at = [&](int64_t i) { return dim ? l * columns + i : i * columns + l; };
    std::stable_sort(o.begin(), o.end(), [&](int64_t a, int64_t b) { return v[at(a)] < v[at(b)]; });
    for (int64_t i = 0; i < n; i++) out[at(i)] = o[i];
  }
  return out;
}

template <class T> void scatter_case(int dim, bool add, bool sorted, bool spread) {
  const Shape shape = {6, 9}, part = dim ? Shape{6, 14} : Shape{14, 9};
  const int64_t rows = part[0], columns = part[1];
  auto source = numbers<T>(product(part));
  if constexpr (std::is_floating_point_v<T>) for (size_t i = 0; i < source.size(); i++) source[i] = (T)std::pow(-7.3, (double)(i % 9));
  Strided<T> src(source, part, dense(part));
  auto numbers_of = ids(spread ? part[dim] : product(part), shape[dim], 8);
  Shape strides = dense(part);
  if (spread) { strides = {0, 0}; strides[dim] = 1; }
  Strided<int64_t> index(numbers_of, part, strides);
  Strided<int64_t> order(spread ? argsort(numbers_of, 1, part[dim], 1) : argsort(numbers_of, rows, columns, dim), part, strides);
  std::vector<T> want = numbers<T>(product(shape));
  Dev<T> y(want);
  const auto vy = test::view(y, shape);
  for (int64_t j = 0; j < part[dim]; j++)  // in the order of the source along dim
    each(part, [&](Shape c) {
      if (c[dim] != j) return;
      const T v = src.at(c);
      c[dim] = index.at(c);
      T& to = want[c[0] * 9 + c[1]];
      if (!add) to = v;
      else if constexpr (std::is_same_v<T, bool>) to = to || v;
      else if constexpr (std::is_arithmetic_v<T>) to = (T)(to + v);
    });
  const smalti_view* o = sorted ? &order.view : nullptr;
  CHECK_RC((add ? smalti_scatter_add : smalti_scatter)(&vy, dim, &index.view, o, &src.view, nullptr));
  test::check_same("scatter", y.get(), want);
}

template <class T> void moves(Shape shape, Shape stride) {
  Strided<T> x(numbers<T>(4096), shape, stride);
  const int rank = (int)shape.size();
  {
    int64_t places[8] = {};
    places[0] = shape[0] / 2;
    if (rank > 2) places[1] = shape[1] - 1;
    Dev<T> y(product(shape));
    const auto vy = test::view(y, shape);
    std::vector<T> want;
    each(shape, [&](Shape c) {
      for (int d = 0; d < rank; d++) c[d] = (c[d] - places[d] + shape[d]) % shape[d];
      want.push_back(x.at(c));
    });
    CHECK_RC(smalti_roll(&x.view, places, &vy, nullptr));
    test::check_same("roll", y.get(), want);
  }
  for (bool last : {false, true}) {
    int64_t before[8] = {};
    Shape to = shape;
    before[0] = 2, to[0] += 3;
    if (last) before[rank - 1] = -1, to[rank - 1] += 1;
    const T value = narrow<T>((Acc<T>)9);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    Dev<T> y(product(to));
    const auto vy = test::view(y, to);
    std::vector<T> want;
    each(to, [&](Shape c) {
      bool inside = true;
      for (int d = 0; d < rank; d++) {
        c[d] -= before[d];
        inside = inside && c[d] >= 0 && c[d] < shape[d];
      }
      want.push_back(inside ? x.at(c) : value);
    });
    CHECK_RC(smalti_pad_constant(&x.view, before, bits, &vy, nullptr));
    test::check_same("pad", y.get(), want);
  }
  for (int64_t diagonal : {-1, 0, 2})
    for (bool upper : {false, true}) {
      Dev<T> y(product(shape));
      const auto vy = test::view(y, shape);
      std::vector<T> want;
      each(shape, [&](Shape c) {
        const int64_t away = c[rank - 1] - c[rank - 2];
        want.push_back((upper ? away >= diagonal : away <= diagonal) ? x.at(c) : narrow<T>((Acc<T>)0));
      });
      CHECK_RC(smalti_triangle(&x.view, diagonal, upper, &vy, nullptr));
      test::check_same("triangle", y.get(), want);
    }
  std::vector<uint8_t> holds;
  for (int64_t i = 0; i < 4096; i++) holds.push_back(i % 3 == 0);
  Strided<uint8_t> mask(holds, shape, dense(shape));
  mask.view.dtype = SMALTI_BOOL;
  Strided<uint8_t> narrow_mask(holds, shape, [&] { Shape s(rank, 0); s[rank - 1] = 1; return s; }());
  narrow_mask.view.dtype = SMALTI_BOOL;
  for (auto* m : {&mask, &narrow_mask}) {
    Dev<T> y(product(shape));
    const auto vy = test::view(y, shape);
    const T value = narrow<T>((Acc<T>)5);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    std::vector<T> want;
    each(shape, [&](Shape c) { want.push_back(m->at(c) ? value : x.at(c)); });
    CHECK_RC(smalti_masked_fill(&x.view, &m->view, bits, &vy, nullptr));
    test::check_same("masked_fill", y.get(), want);
  }
}

}  // namespace

TEST(gather_any_layout) {
  for (bool spread : {false, true})
    for (int dim : {0, 1, 2}) {
      gather_case<float>({3, 5, 8}, {40, 8, 1}, dim, 7, spread);
      gather_case<float>({3, 5, 8}, {1, 3, 15}, dim, 2, spread);
      gather_case<bf16>({2, 5, 16}, {80, 16, 1}, dim, 7, spread);
      gather_case<uint8_t>({2, 5, 32}, {200, 32, 1}, dim, 3, spread);
      gather_case<double>({2, 3, 6}, {18, 6, 1}, dim, 4, spread);
      gather_case<int64_t>({2, 3, 5}, {0, 5, 1}, dim, 4, spread);
    }
  gather_case<float>({9}, {2}, 0, 20, false);
  gather_case<f16>({4, 8}, {16, 1}, 1, 3, true);
}

namespace {
__global__ void far_offsets(Walk<2> w, const int64_t* elements, int64_t* out) {
  int64_t at[2];
  offsets<int64_t>(w, elements[threadIdx.x], at);
  out[2 * threadIdx.x] = at[0];
  out[2 * threadIdx.x + 1] = at[1];
}
}  // namespace

// The arithmetic of tensors of more than 2^32 elements, without their memory.
TEST(gather_far_offsets) {
  const int64_t shape[] = {3, (int64_t)1 << 33, 1, 5}, a[] = {(int64_t)1 << 40, 7, 1, 1}, b[] = {5ll << 33, 5, 9, 1};
  const int64_t* strides[] = {a, b};
  const Walk<2> w = make_walk<2>(4, shape, strides);
  CHECK(w.rank == 3 && w.numel == 15ll << 33);
  std::vector<int64_t> elements, want;
  for (int64_t t = 0; t < 32; t++) {
    const int64_t i = w.numel - 1 - t * 1234567891;
    elements.push_back(i);
    want.push_back((i / (5ll << 33)) * a[0] + i / 5 % (1ll << 33) * 7 + i % 5);
    want.push_back(i);
  }
  Dev<int64_t> e(elements), out(64);
  int rc = 0;
  LAUNCH_FLAT(rc, far_offsets, dim3(1), dim3(32), nullptr, w, e.p, out.p);
  CHECK_RC(rc);
  test::check_same("offsets", out.get(), want);
}

TEST(gather_index_check) {
  auto v = ids(5000, 100, 3);
  Dev<int64_t> work(smalti_index_check_workspace() / 8);
  for (int64_t at : {-1, 17, 4000}) {
    if (at >= 0) v[at] = at == 17 ? 100 : -3;
    if (at == 4000) v[17] = 4;
    Dev<int64_t> d(v);
    const auto view = test::view(d, {50, 100});
    CHECK_RC(smalti_index_check(&view, 100, work.p, nullptr));
    const auto got = work.get();
    CHECK(got[0] == at && (at < 0 || got[1] == v[at]));
  }
  Strided<int64_t> spread({0, 7, 1}, {3, 4}, {1, 0});
  CHECK_RC(smalti_index_check(&spread.view, 7, work.p, nullptr));
  CHECK(work.get()[1] == 7);
  Strided<int64_t> none({0}, {0, 4}, {4, 1});
  CHECK_RC(smalti_index_check(&none.view, 0, work.p, nullptr));
  CHECK(work.get()[0] == -1);
}

TEST(gather_scatter) {
  for (int dim : {0, 1})
    for (bool sorted : {false, true})
      for (bool spread : {false, true}) {
        for (bool add : {false, true}) {
          scatter_case<float>(dim, add, sorted, spread);
          scatter_case<double>(dim, add, sorted, spread);
          scatter_case<int64_t>(dim, add, sorted, spread);
          scatter_case<uint8_t>(dim, add, sorted, spread);
        }
        scatter_case<bf16>(dim, false, sorted, spread);
      }
  Dev<bf16> y(4), s(4);
  Dev<int64_t> i(std::vector<int64_t>(4, 0));
  const auto vy = test::view(y, {4}), vs = test::view(s, {4}), vi = test::view(i, {4});
  CHECK(smalti_scatter_add(&vy, 0, &vi, nullptr, &vs, nullptr) == kInvalid);
}

TEST(gather_one_hot) {
  Dev<int64_t> x(std::vector<int64_t>{2, 0, 1}), y(9);
  const auto vx = test::view(x, {3}), vy = test::view(y, {3, 3});
  CHECK_RC(smalti_one_hot(&vx, &vy, nullptr));
  test::check_same("one_hot", y.get(), {0, 0, 1, 1, 0, 0, 0, 1, 0});
}

TEST(gather_moves) {
  moves<float>({4, 3, 8}, {24, 8, 1});
  moves<float>({4, 3, 5}, {1, 20, 4});
  moves<bf16>({3, 4, 16}, {64, 16, 1});
  moves<f16>({3, 2, 6}, {12, 6, 1});
  moves<double>({3, 7}, {1, 3});
  moves<uint8_t>({3, 2, 32}, {64, 32, 1});
  moves<int64_t>({2, 3}, {3, 1});
}
