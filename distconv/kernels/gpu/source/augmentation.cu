// Images changed at random, one thread for each number of y (count = n H W C). kernels/cpu/augmentation.py says what
// each of an image's ten random numbers is for, and data/augment.py what the amounts are.

// Of x (n, H, W, C), what lies at w (1 - right) + (w + 1) right in a row; 0 outside.
__device__ __forceinline__ float between(const float *x, int n, int h, int w, int c, int H, int W, int C, float right) {
    if (h < 0 || h >= H) return 0;
    const float *row = x + ((n * H + h) * W) * C + c;
    return (w < 0 || w >= W ? 0 : (1 - right) * row[w * C]) + (w + 1 < 0 || w + 1 >= W ? 0 : right * row[(w + 1) * C]);
}

extern "C" __global__ void warp(const float *x, const float *numbers, float *y, int count, int H, int W, int C,
                                float rotate, float shift, float scale, float crop, float flip, float brightness,
                                float erase) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int c = i % C, w = i / C % W, h = i / C / W % H, n = i / C / W / H;
    const float *u = numbers + 10 * n;
    float half = erase * min(H, W) / 2;
    if (fabsf(h - (u[8] * H - 0.5f)) < half && fabsf(w - (u[9] * W - 0.5f)) < half) {
        y[i] = 0;
        return;
    }
    float middle_h = (H - 1) / 2.0f, middle_w = (W - 1) / 2.0f, size = 1 + (2 * u[1] - 1) * scale;
    float angle = (2 * u[0] - 1) * rotate * 0.017453292f, cosine = cosf(angle) / size, sine = sinf(angle) / size;
    float down = (2 * u[2] - 1) * shift * H + floorf(u[4] * (2 * crop + 1)) - crop;
    float across = (2 * u[3] - 1) * shift * W + floorf(u[5] * (2 * crop + 1)) - crop;
    float mirror = flip > 0 && u[6] < 0.5f ? -1.0f : 1.0f;
    float from_h = h - middle_h - down, from_w = mirror * (w - middle_w) - across;
    float h0 = cosine * from_h - sine * from_w + middle_h, w0 = sine * from_h + cosine * from_w + middle_w;
    int top = (int)floorf(h0), left = (int)floorf(w0);
    float low = h0 - top, right = w0 - left;
    float upper = between(x, n, top, left, c, H, W, C, right), lower = between(x, n, top + 1, left, c, H, W, C, right);
    y[i] = (1 + (2 * u[7] - 1) * brightness) * ((1 - low) * upper + low * lower);
}
