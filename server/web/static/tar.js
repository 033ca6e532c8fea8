// A .tar archive around one file, because the service stores models as archives (POSIX ustar; GNU sizes above 8 GiB).

const BLOCK = 512;
const MAX_NAME = 100;
const MAX_OCTAL_SIZE = 8 ** 11;

/** The archive `NAME.tar` of a file `NAME.gguf`. The bytes of the file are not copied. */
export function archiveOf(file) {
  const padding = (BLOCK - (file.size % BLOCK)) % BLOCK;
  const name = file.name.replace(/\.gguf$/i, "");
  const parts = [header(file), file, new Uint8Array(padding + 2 * BLOCK)];
  return new File(parts, `${name}.tar`, { lastModified: file.lastModified });
}

function header({ name, size, lastModified }) {
  const bytes = new Uint8Array(BLOCK);
  const put = (offset, text) => bytes.set(new TextEncoder().encode(text), offset);
  const octal = (number, digits) => Math.floor(number).toString(8).padStart(digits, "0");
  bytes.set(new TextEncoder().encode(name).slice(-MAX_NAME), 0);
  put(100, "0000644\0");
  put(108, "0000000\0");
  put(116, "0000000\0");
  if (size < MAX_OCTAL_SIZE) put(124, `${octal(size, 11)}\0`);
  else bytes.set(binary(size), 124);
  put(136, `${octal(lastModified / 1000, 11)}\0`);
  put(148, " ".repeat(8));
  put(156, "0");
  put(257, "ustar\x0000");
  put(148, `${octal(bytes.reduce((sum, byte) => sum + byte, 0), 6)}\0 `);
  return bytes;
}

/** GNU's field for a large size: twelve big-endian bytes with the highest bit set. */
function binary(size) {
  const field = new Uint8Array(12);
  for (let index = 11, rest = size; index > 0; index -= 1, rest = Math.floor(rest / 256)) field[index] = rest % 256;
  field[0] = 0x80;
  return field;
}
