//! Transposing matrices in memory, 16 x 16 at a time: how channels-first meets channels-last.

/// `to[j * to_step + i] = from[i * from_step + j]` for `i < rows`, `j < columns`.
///
/// # Safety
/// Both matrices lie in valid memory, do not overlap, and nobody else touches `to` meanwhile.
pub unsafe fn transpose<T: Copy>(
    [rows, columns]: [usize; 2],
    from: *const T,
    from_step: isize,
    to: *mut T,
    to_step: isize,
) {
    #[cfg(target_arch = "x86_64")]
    if size_of::<T>() == 4 && super::simd::has_avx512() {
        // Any 4 bytes move as f32 do: nothing is computed.
        return unsafe { avx512::transpose([rows, columns], from.cast(), from_step, to.cast(), to_step) };
    }
    // Blocks, so that the strided side stays in the first-level cache.
    const BLOCK: usize = 16;
    for j in (0..columns).step_by(BLOCK) {
        for i in 0..rows {
            for j in j..columns.min(j + BLOCK) {
                unsafe {
                    *to.offset(j as isize * to_step + i as isize) =
                        *from.offset(i as isize * from_step + j as isize);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose(
        [rows, columns]: [usize; 2],
        from: *const f32,
        from_step: isize,
        to: *mut f32,
        to_step: isize,
    ) {
        for j in (0..columns).step_by(16) {
            for i in (0..rows).step_by(16) {
                unsafe {
                    block(
                        [rows - i, columns - j],
                        from.offset(i as isize * from_step + j as isize),
                        from_step,
                        to.offset(j as isize * to_step + i as isize),
                        to_step,
                    );
                }
            }
        }
    }

    fn first(n: usize) -> __mmask16 {
        if n >= 16 { !0 } else { (1 << n) - 1 }
    }

    /// One block of at most 16 x 16: pairs of rows are interleaved, then pairs of pairs, then the four quarters
    /// of the registers are exchanged.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn block(
        [rows, columns]: [usize; 2],
        from: *const f32,
        from_step: isize,
        to: *mut f32,
        to_step: isize,
    ) {
        let (row_mask, column_mask) = (first(rows), first(columns));
        let mut r = [_mm512_setzero_ps(); 16];
        for i in 0..16 {
            if i < rows {
                r[i] = unsafe { _mm512_maskz_loadu_ps(column_mask, from.offset(i as isize * from_step)) };
            }
        }
        // q[4 g + k]: column 4 l + k of rows 4 g .. 4 g + 4 in quarter l
        let mut q = r;
        for g in 0..4 {
            let [a, b, c, d] = [r[4 * g], r[4 * g + 1], r[4 * g + 2], r[4 * g + 3]];
            let double = |x| _mm512_castps_pd(x);
            let (ab, cd) = (double(_mm512_unpacklo_ps(a, b)), double(_mm512_unpacklo_ps(c, d)));
            let (ab2, cd2) = (double(_mm512_unpackhi_ps(a, b)), double(_mm512_unpackhi_ps(c, d)));
            q[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            q[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            q[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2));
            q[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2));
        }
        for k in 0..4 {
            let even = _mm512_shuffle_f32x4::<0x88>(q[k], q[4 + k]);
            let odd = _mm512_shuffle_f32x4::<0xdd>(q[k], q[4 + k]);
            let even2 = _mm512_shuffle_f32x4::<0x88>(q[8 + k], q[12 + k]);
            let odd2 = _mm512_shuffle_f32x4::<0xdd>(q[8 + k], q[12 + k]);
            r[k] = _mm512_shuffle_f32x4::<0x88>(even, even2);
            r[4 + k] = _mm512_shuffle_f32x4::<0x88>(odd, odd2);
            r[8 + k] = _mm512_shuffle_f32x4::<0xdd>(even, even2);
            r[12 + k] = _mm512_shuffle_f32x4::<0xdd>(odd, odd2);
        }
        for j in 0..16 {
            if j < columns {
                unsafe { _mm512_mask_storeu_ps(to.offset(j as isize * to_step), row_mask, r[j]) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size() {
        for (rows, columns) in [(1, 1), (16, 16), (5, 40), (33, 17), (0, 3), (20, 2)] {
            let from: Vec<f32> = (0..rows * (columns + 3)).map(|i| i as f32).collect();
            let wide: Vec<f64> = from.iter().map(|&v| v as f64).collect();
            let (mut to, mut to_wide) =
                (vec![-1f32; columns * (rows + 1)], vec![-1f64; columns * (rows + 1)]);
            let steps = (columns as isize + 3, rows as isize + 1);
            unsafe {
                transpose([rows, columns], from.as_ptr(), steps.0, to.as_mut_ptr(), steps.1);
                transpose([rows, columns], wide.as_ptr(), steps.0, to_wide.as_mut_ptr(), steps.1);
            }
            for i in 0..rows + 1 {
                for j in 0..columns {
                    let truth = if i < rows { (i * (columns + 3) + j) as f32 } else { -1.0 };
                    assert_eq!((to[j * (rows + 1) + i], to_wide[j * (rows + 1) + i]), (truth, truth as f64));
                }
            }
        }
    }
}
