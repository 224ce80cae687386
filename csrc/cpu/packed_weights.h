// The matrices W from the layer's weights, and the gradient of these from that of W. For kernel files, as simd.h is.
#pragma once
#include "../steerable_conv.h"

namespace equiconv::EQUICONV_ISA {
namespace {

using namespace equiconv::steerable;

// The weights of one entry of a block, between a field of its source and all fields of its target.
template <class T>
struct EntryWeights {
  int64_t weights, packed, fields;      // where the first is, in the layer's and in the packed ones
  int64_t weights_step, packed_step;    // to the next field of the target
  T scale;
};

// f(entry's weights), for the fields of sources whose number is in [begin, end)
template <class T, class F>
void each_entry(const Params& p, int64_t begin, int64_t end, F f) {
  const Header& h = *reinterpret_cast<const Header*>(p.index);
  const Block* blocks = reinterpret_cast<const Block*>(p.index + h.blocks_start);
  int64_t number = 0;
  for (int64_t conv_group = 0; conv_group < p.conv_groups; ++conv_group)
    for (int64_t b = 0; b < h.blocks; ++b) {
      const Block& block = blocks[b];
      const Source& source = reinterpret_cast<const Source*>(p.index + h.sources_start)[block.source];
      const Target& target = reinterpret_cast<const Target*>(p.index + h.targets_start)[block.target];
      for (int64_t s = 0; s < source.fields; ++s, ++number) {
        if (number < begin || number >= end) continue;
        const int64_t weights = block.weights_start + conv_group * block.stride_group + s * block.stride_source;
        const int32_t* entry = p.index + block.entries_start;
        for (int64_t e = 0; e < block.entries; ++e, entry += 4) {
          const int64_t g = entry[0], height = p.index[target.height_start + g];
          const int64_t m = p.m_start[block.target * p.num_groups + g] + entry[1];
          const int64_t k = p.k_start[block.source * p.num_groups + g] + s * p.index[source.depth_start + g];
          const int64_t row = k * p.groups[g].weight_rows + entry[2];
          const int64_t packed = conv_group * p.packed_size + p.groups[g].weights_start + row * p.groups[g].pitch + m;
          f(EntryWeights<T>{weights + entry[3], packed, target.fields, block.stride_target, height,
                            static_cast<const T*>(p.values)[block.scales_start + e]});
        }
      }
    }
}

template <class T>
void pack(const Params& p, int64_t begin, int64_t end) {
  const T* weights = static_cast<const T*>(p.weights);
  T* packed = static_cast<T*>(p.packed);
  each_entry<T>(p, begin, end, [&](const EntryWeights<T>& e) {
    for (int64_t t = 0; t < e.fields; ++t) packed[e.packed + t * e.packed_step] += e.scale * weights[e.weights + t * e.weights_step];
  });
}

template <class T>
void unpack(const Params& p, int64_t begin, int64_t end) {
  const T* packed = static_cast<const T*>(p.grad_packed);
  T* weights = static_cast<T*>(p.grad_weights);
  const int64_t slot_size = p.conv_groups * p.packed_size;
  each_entry<T>(p, begin, end, [&](const EntryWeights<T>& e) {
    for (int64_t t = 0; t < e.fields; ++t) {
      T sum = 0;
      for (int64_t slot = 0; slot < p.slots; ++slot) sum += packed[slot * slot_size + e.packed + t * e.packed_step];
      weights[e.weights + t * e.weights_step] += e.scale * sum;
    }
  });
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
