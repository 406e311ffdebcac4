#!lua flags=allow-oom
-- restore takes in a token that was obtained without the store, unless the
-- record has one that lives about as long, or the token was dropped, or its job has
-- ended.
--
-- arg: slot, id, token (sealed), left, life, generation (0, or the one that the
-- caller gave it).
loadAll()
local s = token(arg.slot)
local left, life, g = tonumber(arg.left), tonumber(arg.life), tonumber(arg.generation)
if g > 0 and g <= number('d') or tombstoned(arg.id) or ended(arg.slot) then return reply('DROPPED') end
if s and (s.id == arg.id or s.ends - now > left * 0.9) then return reply('KNOWN') end
g = nextGeneration(g)
putMax('g', g)
putSlot(arg.slot, {
  g = g, id = arg.id, state = '+', obtained = now - (life - left), ends = now + left, life = life,
  refused = nextRefused(s), early = '0',
}, arg.token)
commit('restore')
return reply('OK')
