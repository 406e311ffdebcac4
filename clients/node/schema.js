import { readFileSync } from 'node:fs';

import protobuf from 'protobufjs';

export const read = (name) => readFileSync(new URL(name, import.meta.url), 'utf8');
const root = protobuf.Root.fromJSON(JSON.parse(read('schema.json')));

/** Encodes an object as a message of that type. */
export const encode = (name, object) => {
  const type = root.lookupType(name);
  return Buffer.from(type.encode(type.fromObject(object)).finish());
};

/** Decodes a message of that type into an object that has all fields. Throws if it is none. */
export const decode = (name, bytes) => {
  const type = root.lookupType(name);
  return type.toObject(type.decode(bytes), { longs: Number, defaults: true });
};

/** Milliseconds as a google.protobuf.Duration, and back; a Timestamp is read alike. */
export const duration = (ms) => ({ seconds: Math.trunc(ms / 1000), nanos: Math.trunc((ms % 1000) * 1e6) });
export const milliseconds = ({ seconds, nanos }) => seconds * 1000 + nanos / 1e6;
