#!lua flags=allow-oom
-- own gives an access token to the first owner who asks, until it is over: others
-- learn whose it is.
--
-- arg: owner, life (ms).
local owner, ends = unpack(redis.call('HMGET', key, 'owner', 'ends'))
if owner and owner ~= arg.owner and toInt(ends) > now then return reply('OWNED', {owner = owner}) end
if not owner or owner ~= arg.owner or toInt(ends) < now + arg.life then
  redis.call('HSET', key, 'owner', arg.owner, 'ends', int(now + arg.life))
  redis.call('PEXPIRE', key, arg.life)
end
return reply('OK', {owner = arg.owner})
